"""The engine on several devices answers as on one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.engine import sizing
from jaxinfer.engine.replicas import Replicas
from jaxinfer.engine.sizing import reads_only_lengths
from jaxinfer.llm import LLM
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.outputs import RequestOutput
from jaxinfer.pallas_kernels.device import H100, use_device
from jaxinfer.sampling_params import SamplingParams
from tests.engine.small import compilations, prompts
from tests.models.families import CONFIGS, weights_of

# One layer, or one of each kind: what layers do to each other is in `test_models.py`.
SHAPES = {
    "llama-9-3": DecoderConfig.tiny(
        vocab_size=251, num_layers=1, num_heads=9, num_kv_heads=3, intermediate_size=80,
        tie_embeddings=True,
    ),
    "qwen2": dataclasses.replace(CONFIGS["qwen2"], num_layers=1),
    "qwen3": dataclasses.replace(CONFIGS["qwen3"], num_layers=1),
    "gemma3": dataclasses.replace(CONFIGS["gemma3"], num_layers=2, local_layers=(True, False)),
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=24)
PAGES = 6


@functools.cache
def decoder(name: str) -> Decoder:
    """On one device."""
    weights = weights_of(SHAPES[name])
    return Decoder.from_weights(SHAPES[name], weights.__getitem__, dtype=jnp.float32)


def llm(name: str, mesh: str | Mesh | None, **options) -> LLM:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128,
             "num_gpu_blocks_override": PAGES, "block_size": 16}  # fmt: skip
    made = LLM((decoder(name), None), mesh=mesh, **(sizes | options))  # type: ignore[arg-type]
    for engine in made.engines:
        engine._checked = True
    return made


@functools.cache
def shared_llm(name: str, mesh: str) -> LLM:
    """One for several tests, so that it is compiled once; each leaves it idle."""
    return llm(name, mesh)


def questions(name: str) -> list[list[int]]:
    vocab_size = SHAPES[name].vocab_size
    return [[token % vocab_size for token in prompt] for prompt in prompts(5)]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@functools.cache
def expected(name: str) -> list[list[int]]:
    """One after another, a page for each: few programs."""
    one = llm(name, None, max_num_seqs=1, num_gpu_blocks_override=1, block_size=128)
    return tokens(one.generate(questions(name), GREEDY))


CASES = [(name, 2) for name in SHAPES] + [("llama-9-3", n) for n in (1, 3, 4)] + [("gemma3", 4)]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_greedy_answers_are_those_of_one_device(name, n):
    """Prompts of several lengths, more requests than rows, pages that run out."""
    made = shared_llm(name, f"tensor={n}")
    before = made.engine.metrics.preemptions
    assert tokens(made.generate(questions(name), GREEDY)) == expected(name)
    assert made.engine.metrics.preemptions > before
    assert made.engine.pages.num_free == PAGES


def test_sampled_answers_and_log_probabilities():
    """Every device draws the same random numbers and so takes the same token."""
    params = [
        SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=12, logprobs=3),
        SamplingParams(temperature=0.7, seed=4, top_k=20, min_p=0.01, max_tokens=12),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=9, prompt_logprobs=2),
        SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.5, max_tokens=12),
        SamplingParams(temperature=0, min_tokens=5, max_tokens=12, logprobs=0),
    ]
    asked = questions("qwen2")
    want, got = (llm("qwen2", mesh).generate(asked, params) for mesh in (None, "tensor=3"))
    assert tokens(got) == tokens(want)
    for field in ("logprobs", "prompt_logprobs"):
        holders = [(o.outputs[0], p.outputs[0]) if field == "logprobs" else (o, p)
                   for o, p in zip(got, want, strict=True)]  # fmt: skip
        for one, other in holders:
            for mine, theirs in zip(getattr(one, field) or [], getattr(other, field) or [],
                                    strict=True):  # fmt: skip
                assert (mine is None) == (theirs is None)
                for token, entry in (mine or {}).items():
                    assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_nothing_is_compiled_again():
    """What comes back from a step goes into the next from the same places."""
    made = shared_llm("qwen2", "tensor=2")
    made.generate(questions("qwen2"), GREEDY)
    known = made.engine.runner.programs
    with compilations() as compiled:
        made.generate(questions("qwen2"), GREEDY)
    assert made.engine.runner.programs == known
    assert compiled == [0]
    state, pages = made.engine.runner._state, made.engine.runner._pages
    assert state is not None
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(state))
    sharding = pages[0][0].sharding
    assert isinstance(sharding, NamedSharding)
    assert sharding.spec == P(None, "tensor", "seq", None)


def test_pages_come_back_after_they_were_lost():
    made = shared_llm("qwen2", "tensor=2")
    made.engine.runner._pages[1][0].delete()
    made.engine.runner.reset_if_lost()
    assert tokens(made.generate(questions("qwen2"), GREEDY)) == expected("qwen2")


def test_a_mesh_and_a_decoder_that_is_divided():
    mesh = Mesh(np.array(jax.devices()[2:4]), ("tensor",))
    made = llm("qwen2", mesh)
    assert tokens(made.generate(questions("qwen2")[:1], GREEDY)) == expected("qwen2")[:1]
    divided = decoder("qwen2").divide(mesh)
    assert [device.id for device in divided.devices] == [2, 3]
    again = LLM((divided, None), max_model_len=64, num_gpu_blocks_override=8)
    sharding = again.engine.runner._pages[0][0].sharding
    assert isinstance(sharding, NamedSharding)
    assert sharding.device_set == set(jax.devices()[2:4])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=9", "needs 9 devices; there are 8; XLA_FLAGS=.*count=9 divides a CPU"),
        ("seq=3,tensor=3", "needs 9 devices"),
        ("data=3,tensor=3", "needs 9 devices"),
    ],
)
def test_meshes_that_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        llm("qwen2", mesh)


def test_copies_of_a_model_share_the_requests():
    """Random numbers are those of one engine, whichever copy answers."""
    one, made = (llm("qwen2", mesh, max_num_seqs=1) for mesh in (None, "data=3,tensor=2"))
    params = SamplingParams(temperature=1.0, max_tokens=12, n=2)
    asked = [prompt[:16] for prompt in questions("qwen2")]  # all are padded alike
    want, got = one.generate(asked, params), made.generate(asked, params)
    for mine, theirs in zip(got, want, strict=True):
        pairs = zip(mine.outputs, theirs.outputs, strict=True)
        assert all(a.token_ids == b.token_ids for a, b in pairs)
    assert [engine.metrics.requests for engine in made.engines] == [4, 4, 2]
    held = [engine.runner._pages[0][0].sharding.device_set for engine in made.engines]
    assert held == [set(jax.devices()[i : i + 2]) for i in (0, 2, 4)]


def test_copies_share_the_arrays_of_the_weights():
    model = decoder("qwen2").divide("data=2,tensor=2")
    copies = model.replicas()
    assert len(copies) == 2
    for array, *parts in zip(*map(jax.tree.leaves, (model, *copies)), strict=True):
        shards = {s.device: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}
        for part in parts:
            for shard in part.addressable_shards:
                assert shard.data.unsafe_buffer_pointer() == shards.pop(shard.device)
        assert not shards


def test_streams_and_names_over_copies():
    made = shared_llm("qwen2", "data=2")
    streams = [made.stream(prompt, GREEDY) for prompt in questions("qwen2")[:3]]
    found = [[], [], []]
    for _ in range(40):
        for stream, ids in zip(streams, found, strict=True):
            for output in itertools.islice(stream, 1):
                ids += output.outputs[0].token_ids
    assert found == expected("qwen2")[:3]
    shared = Replicas(made.engines)
    assert not shared.has_work
    for name in ("a", "b", "c"):
        shared.add_request([1, 2, 3], GREEDY, request_id=name)
    with pytest.raises(ValueError, match="request 'b' is still unfinished"):
        shared.add_request([1], GREEDY, request_id="b")
    shared.abort("a")
    shared.discard(["b", "unknown"])
    ended = {}
    while shared.has_work:
        shared.check_invariants()
        ended |= {o.request_id: o.outputs[0].finish_reason for o in shared.step() if o.finished}
    assert ended == {"a": "abort", "c": "length"}
    assert shared.metrics.requests == sum(engine.metrics.requests for engine in made.engines)
    assert shared.config.page_size == 16


def test_an_error_loses_nothing_that_another_copy_has_delivered(monkeypatch):
    made = shared_llm("qwen2", "data=2")
    shared = Replicas(made.engines)
    for _ in range(2):
        shared.add_request([1, 2, 3], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(made.engines[1].runner, "prefill", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shared.step()
    ids: dict[str, list[int]] = {}
    while shared.has_work:
        for output in shared.step():
            ids.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    assert [len(tokens) for tokens in ids.values()] == [24, 24]


def test_a_cache_is_sized_by_what_one_device_holds(monkeypatch):
    """Each of two devices has half of the KV heads, so there are twice as many pages."""
    page = sizing._page_bytes(CONFIGS["llama-mha"], 16, jnp.float32)
    monkeypatch.setattr(sizing, "_CPU_CACHE_BYTES", 10 * page)
    model = Decoder(CONFIGS["llama-mha"], dtype=jnp.float32)
    for mesh in (None, "tensor=2"):
        made = LLM((model, None), mesh=mesh, block_size=16)
        assert made.engine.pages.num_pages == 10  # devices of a CPU share its memory
    monkeypatch.setattr(sizing, "_CPU_CACHE_BYTES", 20 * page)
    assert LLM((model, None), mesh="tensor=4", block_size=16).engine.pages.num_pages == 15


def test_the_kernel_is_judged_by_the_shape_of_a_device():
    """Llama-3-8B on three devices: three KV heads on each."""
    model = Decoder(DecoderConfig.tiny(num_heads=32, num_kv_heads=8), mesh="tensor=3")
    assert (model.part.num_heads, model.part.num_kv_heads) == (12, 3)
    with use_device(H100):
        config = DecoderConfig.tiny(num_heads=12, num_kv_heads=3, head_dim=128)
        assert reads_only_lengths(config, 64, jnp.bfloat16)
