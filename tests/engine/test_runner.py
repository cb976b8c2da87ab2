"""The compiled functions alone, driven by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.engine.batch import Chunk, DecodeRow
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.sampling_state import Row, SamplingFlags
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.functions import decode_step, prefill
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.device import H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, explain, force_all
from jaxinfer.sampling_params import SamplingParams
from tests.engine.small import decoder

GREEDY = SamplingParams(temperature=0)
FLAGS = SamplingFlags()
PROMPT = [(5 * i) % 250 + 1 for i in range(45)]


def make(
    implementation: str | None = None, *, steps_per_program: int = 1, **buckets: object
) -> Runner:
    fields: dict[str, object] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "table_width": 8,
    }  # fmt: skip
    return Runner(
        decoder(), num_pages=24, page_size=16, dtype=jnp.float32, implementation=implementation,
        buckets=Buckets(**(fields | buckets)),  # type: ignore[arg-type]
        steps_per_program=steps_per_program,
    )  # fmt: skip


def row(prompt=PROMPT, output=(), *, stop=(), params=GREEDY) -> Row:
    return Row(params=params, key=(1, 2), stop_ids=stop, prompt_ids=prompt, output_ids=output)


def chunk(tokens, *, start=0, pages=(3, 1, 7, 5), targets=None, **fields) -> Chunk:
    return Chunk(tokens=tokens, targets=targets, start=start, pages=pages, row=row(**fields))


def decode(runner: Runner, steps: int) -> np.ndarray:
    """`[steps, B]` tokens."""
    results = list(runner.decode(steps, flags=FLAGS))
    return np.stack([np.asarray(result.tokens) for result in results])


def expected(steps: int) -> list[int]:
    """The same by the model's own functions, with contiguous pages."""
    start = jax.jit(prefill, donate_argnames="cache", static_argnames="fresh")
    step = jax.jit(decode_step, donate_argnames="cache")
    model = decoder()
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=64, dtype=jnp.float32)
    scores, cache = start(model, jnp.asarray([PROMPT]), cache=cache, fresh=True)
    tokens = [int(jnp.argmax(scores))]
    for _ in range(steps - 1):
        scores, cache = step(model, jnp.asarray(tokens[-1:]), cache=cache)
        tokens.append(int(jnp.argmax(scores)))
    return tokens


@pytest.mark.parametrize("cuts", [(45,), (16, 32, 45), (1, 44, 45), (31, 45)])
def test_prompt_in_chunks_then_steps(cuts):
    """Scattered pages, padded chunks and idle rows change nothing."""
    want = expected(6)
    runner, start, result = make(), 0, None
    for end in cuts:
        result = runner.prefill(
            [chunk(PROMPT[start:end], start=start)], flags=FLAGS, prompt_top=None
        )
        start = end
    assert result is not None
    first = int(result.tokens[0])
    other = DecodeRow(token=9, length=0, budget=20, row=row([9]))
    mine = DecodeRow(token=first, length=45, budget=20, row=row(output=[first]))
    runner.set_rows([other, mine, other], [[0], [3, 1, 7, 5], [2]], flags=FLAGS)
    tokens = decode(runner, 5)
    assert tokens.shape == (5, 4)
    assert [first, *tokens[:, 1].tolist()] == want
    assert (tokens[:, 3] == -1).all()  # padding takes no part
    assert (tokens[:, 0] == tokens[:, 2]).all()


def test_several_prompts_in_one_call():
    alone = [
        int(make().prefill([chunk(PROMPT[:n])], flags=FLAGS, prompt_top=None).tokens[0])
        for n in (3, 16, 9)
    ]
    chunks = [chunk(PROMPT[:n], pages=[page]) for n, page in ((3, 4), (16, 0), (9, 23))]
    together = make().prefill(chunks, flags=FLAGS, prompt_top=None)
    assert together.tokens.shape == (4,)
    assert together.tokens[:3].tolist() == alone


def test_a_row_stops_by_itself():
    """At its budget or a stop token; it then takes no part and writes nothing."""
    want = expected(6)
    runner = make()
    first = int(runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None).tokens[0])
    stop = want[3]
    assert stop not in want[1:3]
    short = DecodeRow(token=first, length=45, budget=2, row=row())
    stopped = DecodeRow(token=first, length=45, budget=20, row=row(stop=(stop,)))
    # Both rows use the same pages: they write the same.
    runner.set_rows([short, stopped], [[3, 1, 7, 5]] * 2, flags=FLAGS)
    tokens = decode(runner, 5)
    assert tokens[:, 0].tolist() == [*want[1:3], -1, -1, -1]
    assert tokens[:, 1].tolist() == [*want[1:4], -1, -1]
    assert runner._state is not None
    assert runner._state.lengths.tolist() == [0, 0]  # attention has nothing to read for them


def test_steps_do_not_recompile_when_only_values_change():
    runner = make()
    first = int(runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None).tokens[0])
    mine = DecodeRow(token=first, length=45, budget=20, row=row())
    runner.set_rows([mine], [[3, 1, 7, 5]], flags=FLAGS)
    decode(runner, 2)
    known = runner.programs
    assert runner.has_decoder(1, 4, flags=FLAGS)
    runner.set_tables([[3, 1, 7]])
    decode(runner, 2)
    other = DecodeRow(token=3, length=7, budget=9, row=row([1, 2], stop=(5, 6, 7)))
    runner.set_rows([other], [[2]], flags=FLAGS)
    decode(runner, 2)
    runner.prefill([chunk(PROMPT[:40])], flags=FLAGS, prompt_top=None)
    assert runner.programs == known
    # What is new in shape is compiled, once.
    assert not runner.has_decoder(2, 4, flags=FLAGS)
    for _ in range(2):
        runner.set_rows([other, other], [[2], [4]], flags=FLAGS)
        decode(runner, 1)
        assert runner.programs == known + 1
    assert runner.has_decoder(2, 1, flags=FLAGS)
    assert not runner.has_decoder(2, 5, flags=FLAGS)
    assert not runner.has_decoder(2, 4, flags=SamplingFlags(random=True))


def test_full_tables_have_one_width():
    runner = make(full_tables=True)
    mine = DecodeRow(token=3, length=1, budget=9, row=row([1, 2]))
    for pages in ([2], list(range(8))):
        runner.set_rows([mine], [pages], flags=FLAGS)
        decode(runner, 1)
    assert runner.programs == 1


def test_a_chunk_that_is_not_the_last_chooses_no_token():
    whole, pieces = make(), make()
    want = whole.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None)
    first = pieces.prefill([chunk(PROMPT[:16])], flags=None, prompt_top=None)
    assert first.tokens.tolist() == [-1]
    got = pieces.prefill([chunk(PROMPT[16:], start=16)], flags=FLAGS, prompt_top=None)
    assert got.tokens.tolist() == want.tokens.tolist()


def test_prompt_logprobs_equal_those_of_a_full_softmax():
    targets = [*PROMPT[1:], 77]
    result = make().prefill([chunk(PROMPT, targets=targets)], flags=FLAGS, prompt_top=5)
    got = result.prompt_logprobs
    assert got is not None
    model = decoder()
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=64, dtype=jnp.float32)
    tokens, count = jnp.asarray([PROMPT], jnp.int32), jnp.asarray([45], jnp.int32)
    hidden, _ = model(tokens, cache, count, fresh=True)
    want = np.asarray(jax.nn.log_softmax(model.logits(hidden[0])))
    np.testing.assert_allclose(
        got.chosen[0, :45], want[np.arange(45), targets], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(got.top[0, :45], -np.sort(-want)[:, :5], rtol=1e-4, atol=1e-4)


def test_weights_are_arguments_of_the_compiled_step():
    """Never constants inside of it: those would be copied, and folded at compile time."""
    for steps in (1, 2):
        runner = make(steps_per_program=steps)
        runner.set_rows([DecodeRow(token=3, length=1, budget=9, row=row([1]))], [[2]], flags=FLAGS)
        traced = runner._decode.trace(
            runner._weights, pages=runner._pages, state=runner._state, flags=FLAGS
        )
        assert sum(np.size(const) for const in traced.jaxpr.consts) < 1000


def test_pages_are_updated_in_place():
    runner = make()
    before = runner._pages[0][0]
    runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None)
    assert before.is_deleted()  # donated


def test_reset_after_an_interrupted_call():
    runner = make()
    first = int(runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None).tokens[0])
    runner.reset_if_lost()
    kept = runner._pages
    assert runner.prefill([chunk(PROMPT[32:], start=32)], flags=FLAGS, prompt_top=None) is not None
    assert kept[0][0].is_deleted()
    runner._pages[1][0].delete()
    runner.reset_if_lost()
    again = runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None)
    assert int(again.tokens[0]) == first
    runner._pages = ((), ())  # a second interrupt while pages were made
    runner.reset_if_lost()
    assert int(runner.prefill([chunk(PROMPT)], flags=FLAGS, prompt_top=None).tokens[0]) == first


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU may serve them")
@pytest.mark.parametrize("name", ["mosaic", "cudnn"])
def test_implementation_reaches_the_ops(name):
    """A GPU's is refused here, by name; nothing is computed another way."""
    with pytest.raises(NotSupported, match=rf"\[{name}\] does not support device"):
        make(name).prefill([chunk(PROMPT[:16])], flags=FLAGS, prompt_top=None)
    make("xla").prefill([chunk(PROMPT[:16])], flags=FLAGS, prompt_top=None)
    assert choices()["attention"].implementation == "xla"


@pytest.mark.parametrize(("fields", "taken"), [
    ({}, "mosaic"),
    ({"batch_invariant": True}, "xla"),
    ({"implementation": "matmul=xla"}, "mosaic"),
    ({"implementation": "decode_attention=xla"}, "xla"),
    ({"implementation": "decode_attention=mosaic", "batch_invariant": True}, "xla"),
])  # fmt: skip
def test_batch_invariant_decoding_cuts_no_row_where_others_end(fields, taken):
    """On Hopper; the kernel divides the keys of all rows together."""
    config = DecoderConfig.llama3_8b()
    buckets = Buckets(max_num_seqs=4, max_num_batched_tokens=64, table_width=8)
    made = Runner(
        decoder(), num_pages=8, page_size=16, buckets=buckets, dtype=jnp.float32, **fields
    )
    query = jax.ShapeDtypeStruct((2, 1, config.num_heads, config.head_dim), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((4, config.num_kv_heads, 64, config.head_dim), jnp.bfloat16)
    rows = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 2), (2,))]
    with use_device(H100), force_all(made._forced), explain() as verdicts:
        jax.eval_shape(functools.partial(decode_attention), query, pages, pages, *rows)
    assert verdicts[0].implementation == taken
