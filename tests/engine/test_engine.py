"""The loop: what shares a batch, runs out of pages or is interrupted changes nobody's answer."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.engine import Engine
from jaxinfer.errors import ContextLengthError, KVCacheFullError
from jaxinfer.sampling_params import SamplingParams
from tests.engine.small import GREEDY, compilations, decoder, engine, generate, prompts, run

SEEDED = SamplingParams(temperature=1.0, top_p=0.95, top_k=60, seed=11, max_tokens=12)
PENALISED = SamplingParams(
    temperature=0.8, seed=4, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2,
    max_tokens=12,
)  # fmt: skip
MIXED = [GREEDY, SEEDED, PENALISED, SamplingParams(temperature=1.5, seed=9, max_tokens=7)]


def mixed(count: int) -> list[SamplingParams]:
    return list(itertools.islice(itertools.cycle(MIXED), count))


@functools.cache
def one_by_one(count: int) -> list[list[int]]:
    """Answers of `prompts(count)` to `mixed(count)`, each alone in a roomy engine."""
    roomy = engine(max_num_batched_tokens=128)
    alone = zip(prompts(count), mixed(count), strict=True)
    return [generate(roomy, [prompt], [params])[0] for prompt, params in alone]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_seqs": 3, "steps_per_sync": 1},
        {"max_num_seqs": 8, "steps_per_sync": 5},
        {"steps_per_sync": 3, "steps_per_program": 3},
        {"max_num_batched_tokens": 8},  # prompts in chunks
        {"max_num_batched_tokens": 48, "page_size": 32},
        {"full_tables": True},
        {"batch_invariant": True},
    ],
    ids=str,
)
def test_batched_equals_one_by_one(sizes):
    """Token for token: greedy, seeded and penalised requests in one batch."""
    assert generate(engine(**sizes), prompts(9), mixed(9)) == one_by_one(9)


# All that a sampler can be asked for at once, so that few programs are compiled.
EVERYTHING = SEEDED.replace(
    repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.2, max_tokens=40
)
LONG = [EVERYTHING.replace(seed=seed) for seed in range(5)]


@functools.cache
def long_answers() -> list[list[int]]:
    """Answers that need several pages."""
    return generate(engine(max_num_batched_tokens=128, max_num_seqs=1), prompts(5), LONG)


@pytest.mark.parametrize(("num_pages", "chunk"), [(4, 64), (7, 16)])
def test_preemption_leaves_answers_unchanged(num_pages, chunk):
    tight = engine(num_pages=num_pages, max_model_len=64, max_num_batched_tokens=chunk)
    assert generate(tight, prompts(5), LONG) == long_answers()
    assert tight.metrics.preemptions > 0


def test_preemption_prefers_the_oldest():
    tight = engine(num_pages=4, max_num_seqs=2, max_model_len=64)
    long = GREEDY.replace(max_tokens=50)
    names = [tight.add_request(prompt, long) for prompt in ([1, 2, 3], [4, 5, 6])]
    finished = []
    metrics = {}
    while tight.has_work:
        for output in tight.step():
            metrics[output.request_id] = output.metrics
            finished += [output.request_id] if output.finished else []
    assert finished == names
    assert metrics[names[0]].preemptions == 0
    assert metrics[names[1]].preemptions > 0
    assert tight.metrics.preemptions == metrics[names[1]].preemptions
    # Preempted and admitted again only where it can go on: not once per token.
    assert tight.metrics.preemptions <= 3


def test_late_arrivals_change_nothing():
    made = usual()
    names, tokens = [], {}
    pairs = list(zip(prompts(9), mixed(9), strict=True))
    while pairs or made.has_work:
        if pairs:
            names.append(made.add_request(*pairs.pop(0)))
        for output in made.step():
            tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    assert [tokens[name] for name in names] == one_by_one(9)


def test_batch_invariant_logprobs_are_equal_to_the_bit():
    params = GREEDY.replace(logprobs=0)

    def logprobs(made: Engine, batch: list[list[int]]) -> list[float]:
        names = [made.add_request(prompt, params) for prompt in batch]
        found = []
        while made.has_work:
            for output in made.step():
                if output.request_id == names[0]:
                    part = output.outputs[0]
                    entries = zip(part.token_ids, part.logprobs or [], strict=True)
                    found += [entry[token].logprob for token, entry in entries]
        return found

    made = engine(batch_invariant=True)
    alone = logprobs(made, prompts(4)[3:])
    assert logprobs(made, [*prompts(4)[3:], *prompts(3)]) == alone
    assert len(alone) == 12


def test_no_compilation_in_steady_state():
    """The second time, whatever the mixture, everything is there already."""
    made = engine()
    first = generate(made, prompts(9), mixed(9))
    known = made.runner.programs
    with compilations() as count:
        assert generate(made, prompts(9), mixed(9)) == first
    assert made.runner.programs == known
    assert count == [0]
    # The count counts: a batch that needs something new compiles it.
    with compilations() as count:
        generate(made, [[1]], [GREEDY.replace(logprobs=20)])
    assert count[0] >= 2


@functools.cache
def usual() -> Engine:
    """One engine of the usual sizes for tests that leave it idle, so that little is compiled."""
    return engine()


@pytest.mark.parametrize("where", ["prefill", "decode", "set_rows", "set_tables"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_anywhere_loses_nothing(where, error, monkeypatch):
    """At each of the first calls in turn, before it or with the pages taken along."""
    want = one_by_one(5)
    made = usual()
    real = getattr(made.runner, where)
    for fatal in range(6):
        calls = itertools.count()

        def failing(*args, calls=calls, fatal=fatal, **kwargs):
            call = next(calls)
            if call == fatal and fatal % 2:
                made.runner._pages[1][0].delete()
            if call == fatal:
                raise error("now")
            return real(*args, **kwargs)

        monkeypatch.setattr(made.runner, where, failing)
        names = [made.add_request(p, s) for p, s in zip(prompts(5), mixed(5), strict=True)]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        raised = 0
        while made.has_work:
            try:
                outputs = made.step()
            except error:
                raised += 1
                continue
            for output in outputs:
                tokens[output.request_id] += output.outputs[0].token_ids
        assert [tokens[name] for name in names] == want
        assert raised == (fatal < next(calls))
        made.check_invariants()
        assert made.pages.num_free == made.pages.num_pages


def test_an_exception_while_tokens_are_taken(monkeypatch):
    """The tokens taken before it are kept, the others are computed again."""
    want = one_by_one(4)
    made = usual()
    take, calls = made._take, itertools.count()

    def failing(*args):
        if next(calls) in (3, 9, 14):
            raise KeyboardInterrupt
        take(*args)

    monkeypatch.setattr(made, "_take", failing)
    names = [made.add_request(p, s) for p, s in zip(prompts(4), mixed(4), strict=True)]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while made.has_work:
        try:
            for output in made.step():
                tokens[output.request_id] += output.outputs[0].token_ids
        except KeyboardInterrupt:
            pass
    assert [tokens[name] for name in names] == want


def test_prompt_logprobs_are_complete_after_an_exception():
    params = GREEDY.replace(prompt_logprobs=2)
    prompt = prompts(10)[9] * 3

    def logprobs(made: Engine) -> list:
        made.add_request(prompt, params)
        found = None
        while made.has_work:
            try:
                for output in made.step():
                    found = output.prompt_logprobs
            except KeyboardInterrupt:
                pass
        assert found is not None
        return found

    whole = logprobs(engine(max_num_batched_tokens=128))
    made = engine(max_num_batched_tokens=16)
    real, calls = made.runner.prefill, itertools.count()

    def failing(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    made.runner.prefill = failing  # type: ignore[method-assign]
    chunked = logprobs(made)
    assert len(chunked) == len(whole) == len(prompt)
    assert chunked[0] is None
    for got, want, token in zip(chunked[1:], whole[1:], prompt[1:], strict=True):
        assert list(got) == list(want)
        assert got[token].logprob == pytest.approx(want[token].logprob, abs=1e-4)


def test_abort_waiting_prefilling_and_running():
    made = engine(max_num_seqs=2, max_num_batched_tokens=16)
    long = [5] * 60
    names = [made.add_request(prompt, GREEDY) for prompt in ([1, 2], long, [3, 4], [5, 6])]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    reasons: dict[str, str | None] = {}

    def take():
        for output in made.step():
            tokens[output.request_id] += output.outputs[0].token_ids
            reasons[output.request_id] = output.outputs[0].finish_reason

    take()
    take()
    take()
    assert made._scheduler.prefilling is not None
    made.abort(names[1])  # in the middle of its chunks
    made.abort(names[2])  # waiting
    take()
    made.abort(names[0])  # running
    made.abort(names[0])  # twice
    made.abort("nobody")
    while made.has_work:
        take()
    assert [reasons[name] for name in names] == ["abort", "abort", "abort", "length"]
    assert tokens[names[3]] == generate(engine(), [[5, 6]], [GREEDY])[0]
    assert made.pages.num_free == made.pages.num_pages


def test_discard_delivers_nothing():
    made = engine()
    names = [made.add_request([1, 2, 3], GREEDY) for _ in range(2)]
    made.step()
    made.discard(names[:1])
    assert list(run(made)) == names[1:]


def test_each_token_is_delivered_once_and_the_end_once():
    made = engine()
    name = made.add_request([1, 2, 3], GREEDY.replace(n=2, temperature=1.0))
    seen = {0: 0, 1: 0}
    ends = []
    while made.has_work:
        for output in made.step():
            for part in output.outputs:
                seen[part.index] += len(part.token_ids)
                ends += [part.index] if part.finish_reason else []
            assert output.request_id == name
            assert output.finished == (len(ends) == 2)
    assert seen == {0: 12, 1: 12}
    assert sorted(ends) == [0, 1]
    assert made.step() == []


def test_answers_of_one_prompt_differ_and_repeat():
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=10)
    answers = []
    for made in (engine(), engine(max_num_seqs=1)):
        name = made.add_request([1, 2, 3], params)
        answers.append(run(made)[name])
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0].values()}) == 3


def test_without_a_seed_the_engines_seed_and_the_number_decide():
    params = SamplingParams(temperature=1.0, max_tokens=10)
    twice = [generate(engine(seed=1), [[1, 2]] * 2, [params] * 2) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0][0] != twice[0][1]
    assert generate(engine(seed=2), [[1, 2]], [params])[0] != twice[0][0]


def test_stop_tokens_end_an_answer():
    whole = generate(engine(), [[1, 2, 3]], [GREEDY])[0]
    stop = next(token for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
    end = whole.index(stop) + 1
    params = GREEDY.replace(stop_token_ids=[stop])
    made = engine(steps_per_sync=8, steps_per_program=8)  # in the middle of a program
    assert generate(made, [[1, 2, 3]], [params])[0] == whole[:end]
    later = generate(engine(), [[1, 2, 3]], [params.replace(min_tokens=end + 1)])[0]
    assert stop not in later[:end]
    assert len(later) > end


@pytest.mark.parametrize("max_tokens", [1, None])
def test_answers_end_with_the_context(max_tokens):
    made = engine(max_model_len=32)
    params = GREEDY.replace(max_tokens=max_tokens)
    lengths = [len(t) for t in generate(made, [[1] * 31, [1] * 20], [params] * 2)]
    assert lengths == ([1, 1] if max_tokens else [1, 12])


def test_the_whole_cache_can_be_one_request():
    made = engine(num_pages=2, max_model_len=128)
    params = GREEDY.replace(max_tokens=None)
    assert len(generate(made, [[1] * 20], [params])[0]) == 12
    assert len(generate(made, [[1] * 20], [GREEDY.replace(max_tokens=12)])[0]) == 12


BAD = [
    ([], {}, ValueError, "prompt is empty"),
    ([1, 256], {}, ValueError, "token 256 does not exist: the model has 256 tokens"),
    ([-1], {}, ValueError, "token -1 does not exist"),
    ([1], {"stop_token_ids": [999]}, ValueError, "token 999 does not exist"),
    ([1] * 48, {}, ContextLengthError, "48 tokens; the context of 48 tokens .* at most 47"),
    (
        [1] * 20,
        {"max_tokens": 25},
        KVCacheFullError,
        "need 3 KV-cache pages, but there are 2 of 16",
    ),
    ([1] * 32, {"max_tokens": None}, KVCacheFullError, "num_gpu_blocks_override"),
    ([1], {"stop": "x"}, ValueError, "stop strings need a tokenizer"),
]


@functools.cache
def _small() -> Engine:
    """One engine for all refusals, so that little is compiled."""
    return engine(num_pages=2, max_model_len=48)


@functools.cache
def _plain_answer() -> list[int]:
    return generate(engine(), [[1, 2, 3]], [GREEDY])[0]


@pytest.mark.parametrize(("prompt", "fields", "error", "message"), BAD, ids=[b[3] for b in BAD])
def test_bad_requests_are_refused_and_others_go_on(prompt, fields, error, message):
    made = _small()
    name = made.add_request([1, 2, 3], GREEDY)
    made.step()
    with pytest.raises(error, match=message):
        made.add_request(prompt, GREEDY.replace(**fields))
    with pytest.raises(error, match=message):
        made.check_request(prompt, GREEDY.replace(**fields))
    assert run(made)[name][0] == _plain_answer()[1:]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prompt", ["text", [1.5], [[1]], [None]])
def test_a_prompt_must_be_integers(prompt):
    with pytest.raises(TypeError, match="must be a list of token ids"):
        engine().add_request(prompt, GREEDY)


def test_a_name_must_be_free():
    made = engine()
    made.add_request([1], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="request 'a' is still unfinished"):
        made.add_request([1], GREEDY, request_id="a")
    assert list(run(made)) == ["a"]
    made.add_request([1], GREEDY, request_id="a")
    assert list(run(made)) == ["a"]


@pytest.mark.parametrize(
    "name", ["max_model_len", "num_pages", "page_size", "steps_per_sync", "steps_per_program"]
)
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive; got 0"):
        engine(**{name: 0})  # type: ignore[arg-type]


def test_programs_fill_a_group_of_steps():
    with pytest.raises(ValueError, match="steps_per_program must divide steps_per_sync=8; got 3"):
        engine(steps_per_sync=8, steps_per_program=3)


def test_invariants_are_checked_where_the_environment_says_so(monkeypatch):
    config = engine().config
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    made = Engine(decoder(), None, config)
    made.pages.grow("nobody", num_tokens=1)
    with pytest.raises(AssertionError, match="do not compute"):
        made.step()


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 8),  # answer
        st.integers(0, 6),  # arrives at this step
        st.integers(0, 20),  # aborted at this step, if below 8
    ),
    min_size=1,
    max_size=8,
)


@functools.cache
def _tight() -> Engine:
    """One engine for all examples, so that little is compiled; its programs have four steps."""
    return engine(
        num_pages=5, max_model_len=64, max_num_batched_tokens=16, steps_per_sync=4,
        steps_per_program=4,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(requests=REQUESTS)
def test_any_traffic_ends_with_all_pages_free(requests):
    made, roomy = _tight(), _roomy()
    names: dict[int, str] = {}
    tokens: dict[str, list[int]] = {}
    for step in itertools.count():
        for i, (length, answer, arrival, abort) in enumerate(requests):
            if arrival == step:
                params = GREEDY.replace(max_tokens=answer)
                names[i] = made.add_request([i + 1] * length, params)
            if i in names and abort == step < 8:
                made.abort(names[i])
        for output in made.step():
            tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        if step > 8 and not made.has_work:
            break
    assert made.pages.num_free == made.pages.num_pages
    for i, (length, answer, _, abort) in enumerate(requests):
        if abort >= 8:
            params = GREEDY.replace(max_tokens=answer)
            assert tokens[names[i]] == generate(roomy, [[i + 1] * length], [params])[0]


@functools.cache
def _roomy() -> Engine:
    return engine(max_num_batched_tokens=64, max_model_len=64)
