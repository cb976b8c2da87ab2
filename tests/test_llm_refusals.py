"""What `LLM` refuses: before anything is computed, and nothing of a refused call is queued."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.errors import ContextLengthError, KVCacheFullError
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.cli.command import write_tiny_model
from tests.engine.small import GREEDY, assert_idle, decoder, llm, shared_llm


@pytest.fixture
def made():
    yield shared_llm()
    assert_idle(shared_llm())


@pytest.mark.parametrize(
    ("prompts", "params", "error", "match"),
    [
        ("", GREEDY, ValueError, "prompt is empty; give at least one character"),
        (["a", ""], GREEDY, ValueError, r"^prompts\[1\]: prompt is empty"),
        (["a", []], GREEDY, ValueError, r"^prompts\[1\]: prompt is empty; give at least one"),
        ([[1, 256]], GREEDY, ValueError, "^token 256 does not exist: the model has 256 tokens"),
        ([[1], [1, 256]], GREEDY, ValueError, r"^prompts\[1\]: token 256 does not exist"),
        (["a", "\ud800"], GREEDY, ValueError, r"^prompts\[1\]: the text is not valid Unicode"),
        ("a", GREEDY.replace(stop_token_ids=[256]), ValueError,
         "^stop_token_ids: token 256 does not exist"),
        ([[-1]], GREEDY, ValueError, "token -1 does not exist"),
        (jnp.zeros(0, jnp.int32), GREEDY, ValueError, "prompt is empty"),
        (["a", "b"], [GREEDY], ValueError, "one per prompt; got 1 for 2 prompts"),
        (["a", "x" * 128], GREEDY, ContextLengthError,
         r"^prompts\[1\]: prompt has 128 tokens; the context of 128 tokens leaves room for at "
         "most 127"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_requests(made, prompts, params, error, match):
    with pytest.raises(error, match=match):
        made.generate(prompts, params)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "prompts",
    [7, None, [1.5, 2.5], [["a"]], [None], b"abc", [b"abc"], bytearray(b"a"), [True, False],
     [[1, True]], np.array([True, False]), jnp.array([True, False]), jnp.array([1.5]),
     np.array(7), jnp.array(7), jnp.array([[[1]]])],
    ids=repr,
)  # fmt: skip
def test_prompts_of_a_wrong_type(made, prompts):
    with pytest.raises(
        TypeError,
        match=r"prompts(\[0\])? must be (text, token ids|text or a list of token ids)",
    ):
        made.generate(prompts, GREEDY)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prompt", [3, None, b"abc", ["a", "b"], [1.5]], ids=repr)
def test_a_stream_of_a_wrong_type(made, prompt):
    message = f"prompt must be text or a list of token ids (integers); got {prompt!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        made.stream(prompt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [("max_model_len", "100", "an integer"), ("max_model_len", 100.5, "an integer"),
     ("max_num_seqs", True, "an integer"), ("block_size", "64", "an integer"),
     ("seed", 1.0, "an integer"), ("gpu_memory_utilization", "0.9", "a number")],
)  # fmt: skip
def test_sizes_of_a_wrong_type(name, value, what):
    with pytest.raises(TypeError, match=f"^{name} must be {what}; got {value!r}$"):
        LLM((decoder(), None), **{name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("params", [{"temperature": 0}, 7, [{"temperature": 0}], "greedy"])
def test_parameters_of_a_wrong_type(made, params):
    match = "sampling_params must be SamplingParams, or a list of them"
    for call in (made.generate, made.stream):
        with pytest.raises(TypeError, match=match):
            call("a", params)
    with pytest.raises(TypeError, match=match):
        made.chat([{"role": "user", "content": "a"}], params)


def test_no_room_for_one_request():
    made = llm(num_gpu_blocks_override=2)
    with pytest.raises(KVCacheFullError, match="need 3 KV-cache pages, but there are 2 of 16"):
        made.generate("x" * 20, GREEDY.replace(max_tokens=20))
    assert not made.engine.has_work
    assert made.generate("x" * 20, GREEDY)[0].finished


def test_text_without_a_tokenizer():
    made = LLM((decoder(), None), num_gpu_blocks_override=4)
    with pytest.raises(ValueError, match="has no tokenizer; give prompts as token ids"):
        made.generate("hello")
    with pytest.raises(ValueError, match="no tokenizer"):
        made.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (200, "the tokenizer has 256 tokens, the model only 200"),
        (400, "has only 256 tokens, the model 400: more than padding .* another model's"),
    ],
)
def test_a_tokenizer_that_does_not_match(size, match):
    other = Decoder(DecoderConfig.tiny(vocab_size=size), dtype=jnp.float32)
    with pytest.raises(ValueError, match=match):
        LLM((other, byte_tokenizer()))


def test_a_tokenizer_of_a_model_that_pads_its_vocabulary():
    padded = Decoder(DecoderConfig.tiny(vocab_size=320), dtype=jnp.float32)
    assert LLM((padded, byte_tokenizer()), num_gpu_blocks_override=4).tokenizer is not None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_model_len": 513}, "max_model_len must be at most 512"),
        ({"block_size": 48}, "block_size must be one of"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override must be positive"),
        ({"dtype": "float32"}, "dtype applies to a model that is loaded"),
        ({"implementation": "cuda"}, "implementation must be one of .*; got 'cuda'"),
        (
            {"implementation": "mosaic"},
            "'mosaic' cannot serve a whole model here: .* force 'xla'",
        ),
        ({"seed": -1}, "seed must not be negative; got -1"),
        (
            {"num_gpu_blocks_override": 10**9},
            r"KV cache of 1000000000 pages of 64 tokens takes 16384.0 GB, and \d+\.\d GB are "
            "there; lower num_gpu_blocks_override",
        ),
    ],
    ids=str,
)
def test_options(fields, match):
    with pytest.raises(ValueError, match=match):
        LLM((decoder(), None), **fields)


def test_a_context_is_refused_before_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxinfer.loading.load_model", None)
    with pytest.raises(ValueError, match=r"max_model_len must be at most \d+, the longest"):
        LLM(str(write_tiny_model(tmp_path / "model")), max_model_len=10**6)


def test_a_cache_that_the_device_refuses(monkeypatch):
    """Others may have taken the memory meanwhile."""

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr("jaxinfer.engine.runner.Runner._new_pages", refuse)
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes."
    with pytest.raises(KVCacheFullError, match="KV cache of 32 pages of 16 tokens takes"):
        llm()
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        llm()


def test_an_unknown_option():
    with pytest.raises(TypeError, match="max_len"):
        LLM((decoder(), None), max_len=7)  # type: ignore[call-arg]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("model", [7, None, (1, 2), (1, 2, 3)])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"must be (a name|\(Decoder)"):
        LLM(model)
