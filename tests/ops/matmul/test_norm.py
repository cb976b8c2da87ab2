"""A norm after a product: the kernel leaves its division to the product that uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import use_device
from jaxinfer.pallas_kernels.dispatch import (
    NotSupported,
    choices,
    force_implementation,
    supported,
)
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.norm import Norm, UndividedNorm, divided
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.with_norm import matmul_and_norm
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import normal, quick_compilation, same_bits

EPS = 1e-5
SMALL = Config(block_n=64, block_k=64, stages=2)


def arrays(M, K=128, D=192, N=256, dtype="bfloat16"):
    """x, weight, residual, the norm's weight and the next weight."""
    return (
        normal(1, (M, K), dtype), normal(2, (K, D), dtype, K**-0.5), normal(3, (M, D), dtype, 3.0),
        1 + normal(4, (D,), dtype, 0.1), normal(5, (D, N), dtype, D**-0.5),
    )  # fmt: skip


def two_products(x, weight, residual, norm, following, *, implementation, gate=None, **more):
    options = {"implementation": implementation, **more}
    out, normed = matmul_and_norm(x, weight, None, residual, norm=Norm(norm, EPS), **options)
    return out, normed, matmul(normed, following, gate=gate, **options)


@jax.jit(static_argnames="gate")
def reference(x, weight, residual, norm, following, gate):
    out, normed = matmul_reference(x, weight, None, residual, Norm(norm, EPS))
    return out, normed, matmul_reference(normed, following, gate=gate)


def want(*given, gate=None):
    with quick_compilation():
        return reference(*given, gate=gate)


def agree(got, want, dtype):
    for one, other in zip(got, want, strict=True):
        one = divided(one) if isinstance(one, UndividedNorm) else one
        assert one.dtype == dtype
        assert_dtype_close(np.asarray(one, np.float32) / 4, np.asarray(other) / 4, dtype)


def test_reference_matches_float64():
    x, weight, residual, norm, _ = arrays(3, dtype="float32")
    out, normed = matmul_reference(x, weight, None, residual, Norm(norm, EPS))
    total = oracle.matmul(x, weight, None, residual)
    assert_dtype_close(out, total, "float32")
    assert_dtype_close(normed, oracle.add_rms_norm(total, None, norm, eps=EPS)[0], "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_matches_reference(dtype):
    given = arrays(5, dtype=dtype)
    got = two_products(*given, implementation="xla", gate="silu")
    assert isinstance(got[1], jax.Array)
    agree(got, want(*given, gate="silu"), dtype)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("M", [1, 5, 8, 12])
def test_matches_reference(hopper, M, gate):
    given = arrays(M)
    kernel = functools.partial(two_products, implementation="mosaic", gate=gate, config=SMALL)
    got = hopper.run(kernel, *given)
    assert isinstance(got[1], UndividedNorm)
    agree(got, want(*given, gate=gate), "bfloat16")


def test_ctas_that_share_the_depth_of_a_tile(hopper):
    """Only the first of them knows the sums whose squares count."""
    given = arrays(5, K=256, D=256)
    config = Config(block_n=64, block_k=64, stages=2, split=4)
    kernel = functools.partial(two_products, implementation="mosaic", config=config, gate="silu")
    got = hopper.run(kernel, *given, num_sms=16)
    agree(got, want(*given, gate="silu"), "bfloat16")


@pytest.mark.parametrize(("tiles", "num_sms", "cluster"), [(1, 2, 1), (3, 2, 1), (3, 2, 2)])
def test_tiles_that_do_not_fill_the_ctas(hopper, tiles, num_sms, cluster):
    """Every tile's squares are counted once, though CTAs of a pair repeat the last one."""
    given = arrays(4, D=64 * tiles)
    config = Config(block_n=64, block_k=64, stages=2, cluster=cluster)
    kernel = functools.partial(two_products, implementation="mosaic", config=config)
    agree(hopper.run(kernel, *given, num_sms=num_sms), want(*given), "bfloat16")


@pytest.mark.parametrize("M", [20, 24])
def test_the_next_product_may_pad_tokens_otherwise(hopper, M):
    """CTAs that share their loads of tokens pad them to 16, others to 8."""
    x, weight, residual, norm, following = arrays(M)
    paired = Config(block_n=64, block_k=64, stages=2, cluster=2)

    def products(*given, implementation="mosaic", first=SMALL, second=paired):
        *given, following = given
        x, weight, residual, norm = given
        out, normed = matmul_and_norm(
            x, weight, None, residual, norm=Norm(norm, EPS), implementation=implementation,
            config=first,
        )  # fmt: skip
        return out, normed, matmul(normed, following, implementation="mosaic", config=second)

    given = (x, weight, residual, norm, following)
    agree(hopper.run(products, *given, num_sms=4), want(*given), "bfloat16")
    other = functools.partial(products, first=paired, second=SMALL)
    agree(hopper.run(other, *given, num_sms=4), want(*given), "bfloat16")


def test_more_tiles_than_are_added_at_once(hopper):
    given = arrays(2, K=64, D=64 * 66, N=64)
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    agree(hopper.run(kernel, *given, num_sms=8), want(*given), "bfloat16")


def test_without_a_residual(hopper):
    x, weight, _, norm, following = arrays(3)
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    got = hopper.run(kernel, x, weight, None, norm, following)
    agree(got, want(x, weight, None, norm, following), "bfloat16")


def test_rows_do_not_see_each_other(hopper):
    """NaN in one token changes no bit of another."""
    x, *rest = arrays(8)
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    clean = hopper.run(kernel, x, *rest)
    dirty = hopper.run(kernel, x.at[3].set(jnp.nan), *rest)
    others = np.arange(8) != 3
    same_bits(dirty[2][others], clean[2][others])
    assert np.isnan(np.asarray(dirty[2][3], np.float32)).all()


def test_leading_dimensions(hopper):
    x, weight, residual, norm, following = arrays(6)
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    flat = hopper.run(kernel, x, weight, residual, norm, following)
    deep = hopper.run(
        kernel, x.reshape(2, 3, -1), weight, residual.reshape(2, 3, -1), norm, following
    )
    assert deep[1].shape == (2, 3, 192)
    same_bits(divided(deep[1]).reshape(6, -1), divided(flat[1]))
    same_bits(deep[2].reshape(6, -1), flat[2])


@pytest.mark.parametrize("M", [1, 8, 64, 128])
def test_fits_beside_the_choices_of_a_model(h100, M):
    """The ring gives way where it filled the shared memory."""

    def step(x, o, residual, norm, gate_up):
        _, normed = matmul_and_norm(
            x, o, None, residual, norm=Norm(norm, EPS), implementation="mosaic"
        )
        return matmul(normed, gate_up, gate="silu", implementation="mosaic")

    shapes = [(M, 4096), (4096, 4096), (M, 4096), (4096,), (4096, 28672)]
    structs = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    text = plgpu.lower_for_cuda(step, *structs, spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 2


def test_half_precision_is_refused(hopper):
    """A row may exceed what float16 holds before it is divided."""
    given = arrays(2, dtype="float16")
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    with pytest.raises(NotSupported, match="a norm in float16"):
        hopper.run(kernel, *given)


@pytest.mark.usefixtures("unchecked")
def test_values_that_do_not_fit():
    x, weight, *_ = arrays(2)
    with pytest.raises(ValueError, match=r"norm.weight must have shape \(192,\); got \(191,\)"):
        matmul_and_norm(x, weight, norm=Norm(jnp.ones(191, "bfloat16")))
    with pytest.raises(ValueError, match=r"norm.eps must not be negative; got -1"):
        matmul_and_norm(x, weight, norm=Norm(jnp.ones(192, "bfloat16"), -1.0))
    with pytest.raises(TypeError, match=r"norm.weight must be an array; got list"):
        matmul_and_norm(x, weight, norm=Norm([1.0] * 192))
    with pytest.raises(TypeError, match="norm must be a Norm; got NoneType"):
        matmul_and_norm(x, weight, norm=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="must have one dtype"):
        matmul_and_norm(x, weight, residual=jnp.ones((2, 192)), norm=Norm(jnp.ones(192)))


def test_the_norm_may_be_wider_than_the_tokens(hopper):
    """Checkpoints keep norms in float32."""
    x, weight, residual, norm, following = arrays(3)
    given = (x, weight, residual, norm.astype("float32"), following)
    kernel = functools.partial(two_products, implementation="mosaic", config=SMALL)
    agree(hopper.run(kernel, *given), want(*given), "bfloat16")
    agree(two_products(*given, implementation="xla"), want(*given), "bfloat16")


def lowered(implementation, device, D=4096):
    """Text of a product and norm at 64 tokens."""
    shapes = [(64, 4096), (4096, D), (64, D), (D,)]
    structs = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    call = lambda x, weight, residual, norm: matmul_and_norm(
        x, weight, None, residual, norm=Norm(norm), implementation=implementation
    )
    return plgpu.lower_for_cuda(call, *structs, spec=device).count("custom_call @mosaic_gpu")


def test_plain_jax_by_name_is_plain_jax(h100):
    assert lowered("xla", h100) == 0
    assert lowered(None, h100) == 1


def test_a_forced_norm_is_a_launch_of_its_own(h100):
    with force_implementation("mosaic", op="add_rms_norm"):
        assert lowered(None, h100) == 2
    with force_implementation("xla", op="matmul"):
        assert lowered(None, h100) == 1, "the kernel of add_rms_norm"


def test_what_can_serve(h100):
    """A width that `add_rms_norm` has no kernel for does not count against the product's."""
    shapes = [(64, 4096), (4096, 4160), (4160,)]
    structs = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    with use_device(h100):
        reasons = supported(lambda x, w, norm: matmul_and_norm(x, w, norm=Norm(norm)), *structs)
    assert reasons == {"mosaic": "", "xla": ""}


def test_norms_pass_through_jit():
    x, weight, residual, norm, _ = arrays(2, dtype="float32")
    step = jax.jit(lambda x, norm: matmul_and_norm(x, weight, None, residual, norm=norm)[1])
    same_bits(
        step(x, Norm(norm, EPS)),
        jax.jit(lambda x: matmul_and_norm(x, weight, None, residual, norm=Norm(norm, EPS))[1])(x),
    )


@pytest.mark.parametrize(("slower", "implementation"), [(0.8, "mosaic"), (2.5, "xla")])
def test_a_division_is_worth_two_microseconds(monkeypatch, h100, slower, implementation):
    measured = configs.Preference(order=("xla",), config=SMALL, slower_us=slower)
    monkeypatch.setattr(configs, "choose_config", lambda *args, **kwargs: measured)
    values, squares = jnp.ones((2, 128), "bfloat16"), jnp.ones((64, 8))
    normed = UndividedNorm(values, squares, tiles=2, eps=EPS)
    weight = jax.ShapeDtypeStruct((128, 64), "bfloat16")
    plgpu.lower_for_cuda(lambda w: matmul(normed, w), weight, spec=h100)
    assert choices()["matmul"].implementation == implementation
