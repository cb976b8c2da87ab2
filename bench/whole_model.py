"""A whole model with random weights, and those who run it: our engine, and plain JAX."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench import plain_jax, torch_peer
from bench.case import Measurement, WrongResult
from jaxinfer.engine.delivery import merge
from jaxinfer.engine.engine import Engine, EngineConfig
from jaxinfer.engine.sizing import default_batched_tokens, reads_only_lengths
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.metrics import relative_rms

MODELS: dict[str, Callable[[], DecoderConfig]] = {
    "smollm2-135m": DecoderConfig.smollm2_135m,
    # The shape of Llama 3, with the positions of Llama 3.1.
    "llama-3-8b": lambda: dataclasses.replace(
        DecoderConfig.llama3_8b(), max_position_embeddings=131_072
    ),
    "llama-2-7b": DecoderConfig.llama2_7b,
}
RUNNERS = ("dispatch", "xla", "plain_cudnn", "plain_xla")
_WITHOUT = "dispatch-no-"
_SEPARATE = {
    "dispatch-separate-norms": "add_rms_norm=mosaic",
    "dispatch-joined-rope": "project_rope_write=mosaic",
    "dispatch-separate-rope": "project_rope_write=separate",
}
SINGLE_STEPS = "dispatch-single-steps"
_STEPS = 8  # dispatched together
ABLATIONS = (
    *(_WITHOUT + op for op in ("matmul", "decode_attention", "rope_kv_write", "add_rms_norm")),
    *_SEPARATE,
    SINGLE_STEPS,
)
"""The engine with one op in plain JAX, a launch more or less than it chooses, or steps alone."""

# Two layers round a bfloat16 stream about a dozen times, 2^-9 each, and the last product once
# more; float32 differs by the order of summation.
_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
_PAGE = 64


def dtype() -> jnp.dtype:
    """What models are measured in: bfloat16, on a CPU float32."""
    return jnp.dtype("float32" if current_device().platform == "cpu" else "bfloat16")


@functools.lru_cache(maxsize=1)  # one model of 16 GB at a time
def model_of(name: str) -> Decoder:
    """The model with random weights."""
    return jax.block_until_ready(Decoder(MODELS[name](), dtype=dtype()))


@functools.lru_cache(maxsize=2)
def engine_of(name: str, runner: str, rows: int, length: int) -> Engine:
    """An engine for `rows` requests of `length` tokens."""
    return _engine(name, model_of(name), runner, rows, length)


def _engine(name: str, model: Decoder, runner: str, rows: int, length: int) -> Engine:
    config = EngineConfig(
        max_model_len=length,
        num_pages=rows * -(-length // _PAGE),
        page_size=_PAGE,
        max_num_seqs=rows,
        max_num_batched_tokens=default_batched_tokens(),
        steps_per_sync=_STEPS,
        steps_per_program=1 if runner == SINGLE_STEPS else _STEPS,
        dtype=dtype(),
        implementation=_forced(runner),
        full_tables=runner.startswith("dispatch")
        and not runner.endswith("decode_attention")
        and reads_only_lengths(
            MODELS[name](), _PAGE, dtype(), rows=rows, width=-(-length // _PAGE)
        ),
    )
    return Engine(model, None, config)


def _forced(runner: str) -> str | None:
    """A runner as `EngineConfig.implementation`."""
    if runner in _SEPARATE:
        return _SEPARATE[runner]
    if runner.startswith(_WITHOUT):
        return runner.removeprefix(_WITHOUT) + "=xla"
    return None if runner in ("dispatch", SINGLE_STEPS) else runner


@functools.lru_cache(maxsize=2)
def plain_of(name: str, runner: str) -> plain_jax.Greedy:
    """Plain JAX with the same weights."""
    return plain_jax.Greedy(model_of(name), _kernel(runner))


def _kernel(runner: str) -> plain_jax.Kernel:
    return "cudnn" if runner == "plain_cudnn" else "xla"


def ragged_lengths(rows: int, longest: int) -> list[int]:
    """Lengths of prompts, lognormal around 2,000 tokens from 100 to `longest`, which one has."""
    drawn = np.random.default_rng(7).lognormal(np.log(2000), 1.0, rows)
    lengths = np.clip(drawn, 100, longest).astype(int).tolist()
    lengths[int(np.argmax(drawn))] = longest
    return lengths


def prompts(name: str, rows: int, length: int, *, seed: int) -> np.ndarray:
    """`[rows, length]` int32 random tokens."""
    return np.random.default_rng(seed).integers(
        0, MODELS[name]().vocab_size, (rows, length), np.int32
    )


def weight_bytes(config: DecoderConfig) -> int:
    """Weights that a step reads: all but the rows of an embedding that is not the output too."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return dtype().itemsize * (config.num_parameters - embedding)


def kv_bytes(config: DecoderConfig, tokens: float) -> float:
    """Keys and values of so many tokens in all layers."""
    width = config.num_layers * config.num_kv_heads * config.head_dim
    return 2 * dtype().itemsize * width * tokens


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """When tokens of the last request had reached the host: (seconds, tokens so far).

    Only while no other request had ended: what comes later is not the time of the whole batch.
    """

    events: list[tuple[float, int]]

    def us_per_token(self, *, skip: int) -> float:
        """Mean time between tokens after the first `skip`, µs.

        Raises:
            WrongResult: there was no such time.
        """
        later = [event for event in self.events if event[1] > skip]
        if len(later) < 2:
            raise WrongResult(f"others ended before the last request had {skip} tokens")
        first, last = later[0], later[-1]
        return 1e6 * (last[0] - first[0]) / (last[1] - first[1])


def run_engine(engine: Engine, tokens: Iterable[np.ndarray], new_tokens: int) -> Progress:
    """Answer all prompts together, greedily."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    names = [engine.add_request(row.tolist(), params) for row in tokens]
    events, count, alone = [], 0, False
    while engine.has_work:
        outputs = engine.step()
        for output in outputs:
            if output.request_id == names[-1]:
                count += sum(len(part.token_ids) for part in output.outputs)
                if not alone:
                    events.append((time.perf_counter() - start, count))
        alone = alone or any(output.finished for output in outputs)
    if count != new_tokens:
        raise WrongResult(f"{count} tokens came, {new_tokens} were asked for")
    return Progress(events=events)


def tokens_ahead(lengths: Sequence[int]) -> int:
    """Tokens that the first request has before the last has any.

    Between the chunks of a prompt that is too long for one call, others decode.
    """
    chunks = [-(-length // default_batched_tokens()) for length in lengths[1:]]
    return _STEPS * sum(number - 1 for number in chunks)


def measurement(
    name: str, runner: str, once: Callable[[str, int], float], *, runs: int, tokens: int
) -> Measurement:
    """Check a runner, then time it.

    Args:
        name: Model.
        runner: One of `RUNNERS`.
        once: A run of that runner with a seed; its time, µs.
        runs: Timed runs.
        tokens: That one such time yields, for the rate.
    """
    error = check_runner(name, runner)
    start = time.perf_counter()
    once(runner, 0)
    compile_s = time.perf_counter() - start
    times = [once(runner, seed) for seed in range(1, runs + 1)]
    rate = tokens * 1e6 / float(np.median(times))
    return Measurement.of(times, rel_rms=error, compile_s=compile_s, extra={"tokens_per_s": rate})


@functools.cache
def check_runner(name: str, runner: str) -> float:
    """Relative RMS error of the logits after a prompt and a step, two layers deep.

    The reference is plain JAX in float32 with the same weights. The engine shows only the best
    log-probabilities, so of it these are compared.

    Raises:
        WrongResult: too far from it.
        NotSupported: no GPU for cuDNN.
    """
    if runner == "plain_cudnn" and current_device().platform != "gpu":
        raise NotSupported("e2e", runner, "this device", "NVIDIA GPUs")
    config = dataclasses.replace(MODELS[name](), num_layers=2)
    model = Decoder(config, dtype=dtype())
    prompt = prompts(name, 2, 99, seed=1)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    if runner.startswith("plain_"):
        step = prompts(name, 2, 1, seed=2)
        got = _plain_logits(model, prompt, step, _kernel(runner))
        with jax.default_matmul_precision("highest"):
            want = _plain_logits(wide, prompt, step, "xla")
        error = max(relative_rms(*pair) for pair in zip(got, want, strict=True))
    elif runner in torch_peer.RUNNERS:
        with jax.default_matmul_precision("highest"):
            want = _plain_logits(wide, prompt, prompts(name, 2, 1, seed=2), "xla")[0]
        error = relative_rms(torch_peer.logits(model, prompt), want)
    else:
        answers = _engine_answers(name, model, runner, prompt)
        step = np.asarray([answer.token_ids[:1] for answer in answers], np.int32)
        with jax.default_matmul_precision("highest"):
            want = _plain_logits(wide, prompt, step, "xla")
        error = _logprob_error(answers, want)
    if not error <= _TOLERANCE[dtype().name]:
        raise WrongResult(f"logits differ by {error:.1e}; at most {_TOLERANCE[dtype().name]:.0e}")
    return error


def _engine_answers(
    name: str, model: Decoder, runner: str, prompt: np.ndarray
) -> list[CompletionOutput]:
    """Greedy tokens of each prompt, with log-probabilities, from an engine like the timed one.

    One from the prompt, and those of one decode program.
    """
    engine = _engine(name, model, runner, len(prompt), 128)
    params = SamplingParams(
        temperature=0.0, max_tokens=1 + engine.config.steps_per_program, logprobs=MAX_LOGPROBS,
        ignore_eos=True,
    )  # fmt: skip
    names = [engine.add_request(row.tolist(), params) for row in prompt]
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        for delta in engine.step():
            merge(outputs, delta)
    return [outputs[name].outputs[0] for name in names]


def _logprob_error(answers: list[CompletionOutput], want: list[np.ndarray]) -> float:
    """RMS error of the reported log-probabilities, relative to the spread of the logits."""
    errors = []
    for t, logits in enumerate(want):
        known = np.asarray(jax.nn.log_softmax(logits))
        for row, answer in enumerate(answers):
            assert answer.logprobs is not None
            differences = [
                logprob.logprob - known[row, token] for token, logprob in answer.logprobs[t].items()
            ]
            errors.append(np.sqrt(np.mean(np.square(differences))) / np.std(logits[row]))
    return float(max(errors))


def _plain_logits(
    model: Decoder, prompt: np.ndarray, step: np.ndarray, kernel: plain_jax.Kernel
) -> list[np.ndarray]:
    """Logits `[B, V]` after the prompt, and after one more token."""
    cache = plain_jax.new_cache(model, batch_size=2, max_len=128)
    call = jax.jit(functools.partial(plain_jax.forward, kernel=kernel))
    first, cache = call(model, jnp.asarray(prompt), cache, jnp.int32(0))
    second, _ = call(model, jnp.asarray(step), cache, jnp.int32(prompt.shape[1]))
    return [np.asarray(first), np.asarray(second)]
