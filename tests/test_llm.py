"""`LLM` with a random decoder that knows bytes: answers and streams."""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import LLM, SamplingParams
from jaxinfer.errors import (
    CheckpointError,
    ContextLengthError,
    KVCacheFullError,
    UnsupportedModelError,
)
from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.engine.small import (
    GREEDY,
    alone,
    assert_idle,
    decoder,
    llm,
    shared_llm,
    tokenizer,
)

LONG = GREEDY.replace(max_tokens=40)


@pytest.fixture
def made():
    yield shared_llm()
    assert_idle(shared_llm())


@functools.cache
def answer(prompt: str, max_tokens: int = 12) -> list[int]:
    return alone(prompt, max_tokens)


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


class TestGenerate:
    def test_one_text(self, made):
        [output] = made.generate("hello", GREEDY)
        completion = output.outputs[0]
        assert (output.prompt, output.finished) == ("hello", True)
        assert output.prompt_token_ids == made.tokenizer.encode("hello")
        assert len(completion.token_ids) == 12
        assert completion.text == made.tokenizer.decode(completion.token_ids)
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert output.metrics.output_tokens == 12
        assert 0 <= output.metrics.queue_s <= output.metrics.ttft_s <= output.metrics.total_s

    def test_texts_and_tokens_in_order(self, made):
        ids = made.tokenizer.encode("hello")
        outputs = made.generate(["hello", ids, "b", np.array(ids)], GREEDY)
        assert [output.prompt for output in outputs] == ["hello", None, "b", None]
        tokens = [output.outputs[0].token_ids for output in outputs]
        assert tokens[0] == tokens[1] == tokens[3] == answer("hello")
        assert tokens[2] == answer("b")

    def test_a_list_of_ids_is_one_prompt(self, made):
        [output] = made.generate(made.tokenizer.encode("hello"), GREEDY)
        assert output.outputs[0].token_ids == answer("hello")

    @pytest.mark.parametrize("kind", [np.array, jnp.array], ids=["numpy", "jax"])
    def test_arrays_of_ids(self, made, kind):
        """Alone, in a list, as rows of a matrix, and taken apart into their numbers."""
        ids = kind(made.tokenizer.encode("hello"))
        for prompts, count in ((ids, 1), (list(ids), 1), ([ids, list(ids)], 2), (ids[None], 1)):
            outputs = made.generate(prompts, GREEDY)
            assert [output.outputs[0].token_ids for output in outputs] == [answer("hello")] * count
            assert all(type(token) is int for token in outputs[0].prompt_token_ids)
        pieces = list(made.stream(ids, GREEDY))
        assert flat(piece.outputs[0].token_ids for piece in pieces) == answer("hello")

    def test_parameters_for_each(self, made):
        params = [GREEDY.replace(max_tokens=n) for n in (1, 5, 3)]
        outputs = made.generate(["hello"] * 3, params)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]

    def test_several_answers(self, made):
        params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=8)
        [output] = made.generate("hello", params)
        assert [part.index for part in output.outputs] == [0, 1, 2]
        assert len({tuple(part.token_ids) for part in output.outputs}) == 3

    def test_nothing_to_do(self, made):
        assert made.generate([]) == []

    def test_the_default_parameters(self, made):
        [output] = made.generate("hello")
        assert len(output.outputs[0].token_ids) == 16

    @pytest.mark.parametrize("n", [1, 2])
    def test_progress_counts_answers(self, made, n):
        steps = []
        params = SamplingParams(temperature=1.0, n=n, max_tokens=4)
        made.generate(["a", "b", "c"], params, use_tqdm=lambda *step: steps.append(step))
        assert steps[-1] == ("generate", 3 * n, 3 * n)
        assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})

    def test_progress_on_standard_error(self, made, capsys):
        made.generate(["a", "b"], GREEDY, use_tqdm=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "2 answers" in err

    def test_an_interrupt_ends_all_of_a_call(self, made):
        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            made.generate(["hello"] * 6, GREEDY, use_tqdm=interrupt)
        assert made.generate("hello", GREEDY)[0].outputs[0].token_ids == answer("hello")


class TestStops:
    def test_a_stop_string(self, made):
        whole = made.tokenizer.decode(answer("hello"))
        stop = whole[4:6]
        assert stop not in whole[:5]
        for keep in (False, True):
            params = GREEDY.replace(stop=stop, include_stop_str_in_output=keep)
            [output] = made.generate("hello", params)
            completion = output.outputs[0]
            assert completion.text == whole[: 6 if keep else 4]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)

    def test_a_stop_token(self, made):
        stop = answer("hello")[5]
        [output] = made.generate("hello", GREEDY.replace(stop_token_ids=[stop]))
        completion = output.outputs[0]
        assert completion.token_ids == answer("hello")[: answer("hello").index(stop) + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)

    def test_the_models_end(self):
        """The end token is in the tokens, not in the text; `ignore_eos` goes on."""
        end = answer("hello")[5]
        first = answer("hello").index(end)
        made = llm(eos_id=end)
        [stopped, ignored] = made.generate(["hello"] * 2, [GREEDY, GREEDY.replace(ignore_eos=True)])
        assert stopped.outputs[0].token_ids == answer("hello")[: first + 1]
        assert stopped.outputs[0].text == tokenizer().decode(answer("hello")[:first])
        assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", None)
        assert ignored.outputs[0].token_ids == answer("hello")


class TestChat:
    TALK = ({"role": "user", "content": "Hi"},)

    def test_one_conversation(self, made):
        [output] = made.chat(self.TALK, GREEDY)
        assert made.tokenizer.decode(output.prompt_token_ids) == "user: Hi\nassistant: "
        assert output.outputs[0].token_ids == answer("user: Hi\nassistant: ")

    def test_several(self, made):
        other = [{"role": "system", "content": "S"}, *self.TALK]
        outputs = made.chat([self.TALK, other], GREEDY)
        assert outputs[0].outputs[0].token_ids == answer("user: Hi\nassistant: ")
        assert outputs[1].prompt_token_ids == made.tokenizer.apply_chat_template(other)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("messages", "error", "match"),
        [
            ([], ValueError, "messages is empty"),
            ("Hi", TypeError, "messages must be a list of"),
            ({"role": "user", "content": "Hi"}, TypeError, "messages must be a list of"),
            ([{"role": "user"}], ValueError, "needs role and content"),
            ([[]], ValueError, "at least one message"),
            (7, TypeError, "messages must be a list of {'role': …, 'content': …}; got 7"),
            (["Hi"], TypeError, r"or a list of such lists; got 'Hi' as messages\[0\]"),
            ([b"Hi"], TypeError, r"or a list of such lists; got b'Hi' as messages\[0\]"),
            ([None], TypeError, r"or a list of such lists; got None as messages\[0\]"),
            ([5], TypeError, r"or a list of such lists; got 5 as messages\[0\]"),
            ([[*TALK], *TALK], TypeError, r"; got {'role': .*} as messages\[1\]"),
            ([*TALK, "Hi"], ValueError, "needs role and content; got 'Hi'"),
            ([{"role": "user", "content": None}], TypeError, "content of a message must be text"),
            (
                [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                TypeError,
                r"must be text, not None or a list of parts; got \[\{'type'",
            ),
        ],
        ids=str,
    )
    def test_messages_that_are_none(self, made, messages, error, match):
        with pytest.raises(error, match=match):
            made.chat(messages, GREEDY)

    def test_one_of_several_conversations_is_named(self, made):
        other = [{"role": "user", "content": "x" * 128}]
        with pytest.raises(ContextLengthError, match=r"^messages\[1\]: prompt has "):
            made.chat([self.TALK, other], GREEDY)
        with pytest.raises(ValueError, match=r"^messages\[1\]: .*role and content"):
            made.chat([self.TALK, [{"role": "user", "contents": "a"}]], GREEDY)
        with pytest.raises(ContextLengthError, match=r"^prompt has "):
            made.chat(other, GREEDY)

    def test_without_a_template(self):
        words = byte_tokenizer()
        words.chat_template = None
        made = LLM((decoder(), words), num_gpu_blocks_override=4)
        with pytest.raises(ValueError, match="no chat template"):
            made.chat(self.TALK)

    def test_a_template_that_breaks(self):
        words = byte_tokenizer()
        words.chat_template = "{{ 1 / 0 }}"
        made = LLM((decoder(), words), num_gpu_blocks_override=4)
        with pytest.raises(ValueError, match="chat template failed"):
            made.chat(self.TALK)


class TestStream:
    def test_pieces_add_up(self, made):
        [whole] = made.generate("hello", LONG)
        outputs = list(made.stream("hello", LONG))
        assert len(outputs) > 10
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        parts = [output.outputs[0] for output in outputs]
        assert flat(part.token_ids for part in parts) == whole.outputs[0].token_ids
        assert "".join(part.text for part in parts) == whole.outputs[0].text
        assert parts[-1].finish_reason == "length"

    def test_interleaved_with_each_other_and_with_generate(self, made):
        """All share the batch; what is for one never reaches another."""
        streams = {name: made.stream(name, LONG) for name in ("hello", "b", "xyz")}
        tokens: dict[str, list[int]] = {name: [] for name in streams}
        for turn in range(200):
            if turn == 4:
                [output] = made.generate("hello", GREEDY)
                assert output.outputs[0].token_ids == answer("hello")
            # Some are asked more often than others.
            for i, (name, stream) in enumerate(list(streams.items())):
                if turn % (i + 1) == 0:
                    try:
                        tokens[name] += next(stream).outputs[0].token_ids
                    except StopIteration:
                        del streams[name]
        assert not streams
        assert tokens == {name: answer(name, 40) for name in tokens}

    def test_closing_the_iterator_ends_the_request(self, made):
        stream, other = made.stream("hello", LONG), made.stream("b", LONG)
        next(stream)
        first = next(other)
        assert len(made.engine._scheduler.running) == 2
        stream.close()
        assert len(made.engine._scheduler.running) == 1
        rest = [output.outputs[0].token_ids for output in other]
        assert first.outputs[0].token_ids + flat(rest) == answer("b", 40)

    def test_leaving_a_loop_ends_the_request(self, made):
        for output in made.stream("hello", LONG):
            assert output.outputs
            break

    def test_nothing_begins_before_the_first_piece(self, made):
        stream = made.stream("hello", LONG)
        assert not made.engine.has_work
        stream.close()

    def test_errors_come_at_once(self, made):
        with pytest.raises(ValueError, match="prompt is empty"):
            made.stream("")
        with pytest.raises(ContextLengthError):
            made.stream("x" * 500)

    def test_a_request_that_someone_else_took_out(self, made):
        stream = made.stream("hello", LONG)
        name = next(stream).request_id
        made.engine.discard([name])
        with pytest.raises(RuntimeError, match="taken out of the engine by someone else"):
            list(stream)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a converted directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_orbax(folder, decoder(), tokenizer=byte_tokenizer(eos_id=None))
    return folder


class TestLoading:
    @pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
    def test_from_a_directory(self, folder, kind):
        seen = []
        made = LLM(kind(folder), num_gpu_blocks_override=8, progress=lambda *s: seen.append(s))
        assert made.generate("hello", GREEDY)[0].outputs[0].token_ids == answer("hello")
        assert seen[-1][1] == seen[-1][2] > 10

    def test_in_another_dtype(self, folder):
        made = LLM(folder, dtype="bfloat16", num_gpu_blocks_override=8)
        assert made.engine.config.dtype == jnp.bfloat16
        with pytest.raises(ValueError, match=r"dtype must be auto, .*; got 'int3'"):
            LLM(folder, dtype="int3")

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("max_model_len", 0, "must be positive; got 0"),
            ("max_num_seqs", 0, "must be positive; got 0"),
            ("max_num_batched_tokens", -1, "must be positive; got -1"),
            ("steps_per_sync", 0, "must be positive; got 0"),
            ("num_gpu_blocks_override", 0, "must be positive; got 0"),
            ("gpu_memory_utilization", 7, "must be more than 0 and at most 1; got 7"),
            ("gpu_memory_utilization", float("nan"), "must be more than 0 and at most 1; got nan"),
            ("block_size", 48, "must be one of"),
            ("seed", -1, "must not be negative; got -1"),
        ],
    )
    def test_sizes_are_checked_before_a_model_is_read(self, name, value, match):
        with pytest.raises(ValueError, match=f"{name} {match}"):
            LLM("/absent", **{name: value})

    def test_errors_are_what_is_documented(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"absent.gguf' does not exist"):
            LLM(str(tmp_path / "absent.gguf"))
        (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
        with pytest.raises(CheckpointError, match=r"broken.gguf: truncated or corrupt"):
            LLM(tmp_path / "broken.gguf")
        assert issubclass(UnsupportedModelError, CheckpointError)
        for error in (CheckpointError, ContextLengthError, KVCacheFullError):
            assert issubclass(error, ValueError)


def test_one_thread_may_follow_another(made):
    """Not at once, but an LLM is not tied to the thread that made it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(made.generate("hello", GREEDY)[0]))
    thread.start()
    thread.join()
    assert found[0].outputs[0].token_ids == answer("hello")


def test_metrics_add_up():
    made = llm()
    made.generate(["hello", "b"], GREEDY)
    metrics = made.engine.metrics
    assert (metrics.requests, metrics.prompt_tokens, metrics.output_tokens) == (2, 6, 24)
    assert metrics.compilations_total >= 2
    known = dataclasses.replace(metrics)
    made.generate(["hello", "b"], GREEDY)
    assert made.engine.metrics.compilations_total == known.compilations_total


def test_names_of_the_package():
    assert set(jaxinfer.__all__) <= set(dir(jaxinfer))
    for name in jaxinfer.__all__:
        assert getattr(jaxinfer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = jaxinfer.Llm  # type: ignore[attr-defined]
