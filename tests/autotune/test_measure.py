"""The gate before the clock, and what the clock is given."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.autotune import decode_attention as attention
from jaxinfer.autotune import matmul as product
from jaxinfer.autotune import measure as module
from jaxinfer.autotune.measure import Times, WrongResult
from jaxinfer.autotune.ops import OPS
from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.specs import DecodeSpec
from jaxinfer.pallas_kernels.device import H100, current_device
from jaxinfer.pallas_kernels.matmul.config import candidates
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec
from tests.ops.cases import quick_compilation

SPEC = MatmulSpec(model="tiny", M=3, K=128, N=256, gate="silu", bias=True)
TILINGS = [Config(block_n=64), Config(block_n=128)]
CALL = DecodeSpec(model="tiny", B=2, S=128, N=4, K=2, H=64)
CALL_TILINGS = [attention.Config(block=64, stages=2), attention.Config(block=128, stages=2)]


def measure(spec, tilings):
    name = "matmul" if isinstance(spec, MatmulSpec) else "decode_attention"
    return module.measure(OPS[name], spec, tilings)


@pytest.fixture
def fake(monkeypatch):
    """The kernel computes as XLA does, plus an error; the clock counts up. Gives what was timed."""
    timed = []

    def install(error=0.0):
        def instead(real):
            def op(*arrays, implementation, config=None, **options):
                result = real(*arrays, **options, implementation="xla")
                return result if implementation == "xla" else result + result * error

            return op

        def call_times(call, repeats, *, flush):
            assert flush, "in a model, other layers come between two calls"
            timed.append([jax.block_until_ready(call()) for _ in range(2)])
            return [float(len(timed))] * repeats

        monkeypatch.setattr(product, "matmul", instead(product.matmul))
        monkeypatch.setattr(attention, "decode_attention", instead(attention.decode_attention))
        monkeypatch.setattr(module, "call_times", call_times)
        return timed

    return install


def test_medians_of_several_rounds(fake):
    timed = fake()
    # Rounds in turn: XLA gets the 1st, 4th and 7th time, the tilings those after it.
    assert measure(SPEC, TILINGS) == Times(xla_us=4.0, kernel_us={TILINGS[0]: 5.0, TILINGS[1]: 6.0})
    assert len(timed) == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("error", [0.02, jnp.nan])
def test_a_wrong_result_gets_no_time(fake, error, dtype):
    timed = fake(error)
    spec = MatmulSpec(model="tiny", M=3, K=128, N=256, dtype=dtype)
    message = (
        r"the kernel with Config\(block_n=64, .* computes tiny m3 k128 n256.* wrongly: relative"
    )
    with pytest.raises(WrongResult, match=message):
        measure(spec, TILINGS)
    assert timed == []


@pytest.mark.parametrize("error", [0.02, jnp.nan])
def test_a_wrong_attention_gets_no_time(fake, error):
    timed = fake(error)
    message = r"the kernel with Config\(block=64, .* computes tiny b2 s128 wrongly: relative RMS"
    with pytest.raises(WrongResult, match=message):
        measure(CALL, CALL_TILINGS)
    assert timed == []


def test_medians_of_attention(fake):
    fake()
    times = measure(CALL, CALL_TILINGS)
    assert times == Times(xla_us=4.0, kernel_us={CALL_TILINGS[0]: 5.0, CALL_TILINGS[1]: 6.0})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_attention_is_not_wrong(fake, dtype):
    fake()
    of = functools.partial(DecodeSpec, model="tiny", B=3, N=6, K=2, H=64, dtype=dtype)
    specs = [of(S=64), of(S=1024, local_window_size=50), of(S=1024, logits_softcap=5.0)]
    for spec in specs:
        assert measure(spec, []).kernel_us == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_not_wrong(fake, dtype):
    fake()
    for gate in (None, "silu", "gelu_tanh"):
        spec = MatmulSpec(model="tiny", M=8, K=256, N=256, gate=gate, bias=True, dtype=dtype)
        assert measure(spec, []).kernel_us == {}


def test_nor_is_the_order_of_summation(fake):
    fake()
    head = MatmulSpec(model="tiny", M=8, K=4096, N=256, cast=True)
    assert measure(head, []).kernel_us == {}


@pytest.mark.parametrize("cast", [False, True])
def test_the_kernel_itself_passes_the_gate(monkeypatch, cast):
    """In the interpreter, which has no clock."""
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on CPUs: set JAX_PLATFORMS=cpu")
    asked = []
    monkeypatch.setattr(module, "call_times", lambda *_, **__: asked.append(1) or [1.0])
    tiling = Config(block_n=64, block_k=64, stages=2)
    few = dataclasses.replace(H100, num_sms=2)
    with plgpu.interpret(few, detect_races=False), quick_compilation():
        spec = MatmulSpec(model="tiny", M=3, K=128, N=128, gate="silu", cast=cast)
        times = measure(spec, [tiling])
    assert times == Times(xla_us=1.0, kernel_us={tiling: 1.0})
    assert len(asked) == 6


def test_the_kernel_of_attention_passes_the_gate(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on CPUs: set JAX_PLATFORMS=cpu")
    monkeypatch.setattr(module, "call_times", lambda *_, **__: [1.0])
    tiling = attention.Config(block=64, stages=2)
    few = dataclasses.replace(H100, num_sms=4)
    with plgpu.interpret(few, detect_races=False), quick_compilation():
        times = measure(DecodeSpec(model="tiny", B=2, S=128, N=4, K=2, H=64), [tiling])
    assert times == Times(xla_us=1.0, kernel_us={tiling: 1.0})


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 64])
def test_attention_on_a_gpu(B):
    device = current_device()
    if not device.is_hopper:
        pytest.skip(f"needs compute capability 9.0; this is {device.name}")
    spec = DecodeSpec(model="llama-3-8b", B=B, S=1024, N=32, K=8, H=128)
    tilings = OPS["decode_attention"].candidates(device, spec)
    times = measure(spec, tilings)
    assert set(times.kernel_us) == set(tilings)
    for us in (times.xla_us, *times.kernel_us.values()):
        assert 3 < us < 1000  # on an H100 7 to 99 µs, XLA 15 to 320


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 64])
def test_on_a_gpu(M):
    device = current_device()
    if not device.is_hopper:
        pytest.skip(f"needs compute capability 9.0; this is {device.name}")
    spec = MatmulSpec(model="llama-3-8b", part="o", M=M, K=4096, N=4096)
    tilings = candidates(device, M=M, K=4096, N=4096, gated=False)
    times = measure(spec, tilings)
    assert set(times.kernel_us) == set(tilings)
    for us in (times.xla_us, *times.kernel_us.values()):
        assert 5 < us < 500  # reading the weight takes 10 µs on an H100
