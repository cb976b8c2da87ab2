"""`project_rope_write`: one launch against two ops, simulated and on the GPU."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation
from jaxinfer.pallas_kernels.matmul.norm import Norm, UndividedNorm
from jaxinfer.pallas_kernels.matmul.rotation import Heads
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.with_norm import matmul_and_norm
from jaxinfer.pallas_kernels.rope_kv_write import config
from jaxinfer.pallas_kernels.rope_kv_write.config import ONE_LAUNCH, one_launch_config
from jaxinfer.pallas_kernels.rope_kv_write.projection_specs import SPECS, make_inputs
from jaxinfer.pallas_kernels.rope_kv_write.with_projection import project_rope_write
from tests.metrics import assert_dtype_close
from tests.ops.cases import cases, inputs, normal, quick_compilation, same_bits, shapes_of
from tests.ops.rope_kv_write.calls import STRAY_SLOTS, astray, changed_slots

PAGE = 16


def arrays(B, N, K, H, D, *, bias=False, dtype="bfloat16", absent=()) -> tuple[Any, ...]:
    """Arguments of a call; every request has two pages of its own, `absent` ones no token."""
    columns, pool = (N + 2 * K) * H, (2 * B + 1, K, PAGE, H)
    rng = np.random.default_rng(9)
    angles = rng.uniform(0, 6, (B, 1, H // 2)).astype(np.float32)
    table = rng.permutation(2 * B).reshape(B, 2) + 1
    start = rng.integers(0, 2 * PAGE, B)
    return (
        normal(1, (B, 1, D), dtype), normal(2, (D, columns), dtype, D**-0.5),
        normal(3, (columns,), dtype) if bias else None,
        jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)),
        normal(4, pool, dtype), normal(5, pool, dtype), jnp.asarray(table, jnp.int32),
        jnp.asarray(start, jnp.int32), jnp.asarray([int(b not in absent) for b in range(B)]),
    )  # fmt: skip


def norms(H, dtype="bfloat16") -> dict[str, Any]:
    """Of queries and keys; each has an `eps` of its own."""
    return {
        "q_norm": Norm(1 + normal(6, (H,), dtype, 0.1), 1e-5),
        "k_norm": Norm(1 + normal(7, (H,), dtype, 0.1), 1e-2),
    }


def run(hopper, given, num_heads, implementation="mosaic", **more):
    call = functools.partial(
        project_rope_write, num_heads=num_heads, implementation=implementation, **more
    )
    return hopper.run(call, *given, num_sms=8)


def want(given, num_heads, **more):
    """An op each, in float32."""
    wide: Any = [
        x if x is None or jnp.issubdtype(x.dtype, jnp.integer) else x.astype("float32")
        for x in given
    ]
    wider = {name: Norm(norm.weight.astype("float32"), norm.eps) for name, norm in more.items()}
    call = functools.partial(project_rope_write, num_heads=num_heads, implementation="xla", **wider)
    with quick_compilation():
        return jax.jit(call)(*wide)


def agree(got, want, dtype):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        assert_dtype_close(np.asarray(one, np.float32) / 4, np.asarray(other) / 4, dtype)


@pytest.mark.parametrize(("B", "N", "K", "H", "D", "options"), [
    (1, 2, 1, 128, 128, {}),
    (3, 2, 1, 128, 192, {"bias": True}),
    (5, 1, 1, 256, 64, {}),
    (3, 2, 1, 64, 192, {"bias": True}),
    (2, 1, 1, 128, 64, {"dtype": "float16"}),
    (9, 1, 1, 64, 64, {}),
], ids=str)  # fmt: skip
def test_matches_the_two_ops(hopper, B, N, K, H, D, options):
    given = arrays(B, N, K, H, D, **options)
    tiling = Config(block_n=max(H // 2, 64), block_k=64, stages=2)
    agree(run(hopper, given, N, config=tiling), want(given, N), given[0].dtype)


@pytest.mark.parametrize(("B", "N", "K", "H", "D", "options"), [
    (3, 1, 2, 128, 64, {"bias": True}),
    (2, 1, 1, 256, 64, {}),
    (2, 1, 1, 64, 64, {}),
], ids=str)  # fmt: skip
def test_heads_under_a_norm(hopper, B, N, K, H, D, options):
    """Queries and keys by their own weights, values by none."""
    given = arrays(B, N, K, H, D, **options)
    tiling = Config(block_n=max(H // 2, 64), block_k=64, stages=2)
    got = run(hopper, given, N, config=tiling, **norms(H))
    agree(got, want(given, N, **norms(H)), "bfloat16")


@pytest.mark.parametrize(("H", "num_sms"), [(64, 2), (128, 3)])
def test_more_heads_than_ctas(hopper, H, num_sms):
    given = arrays(1, 3, 1, H, 64)
    kernel = functools.partial(
        project_rope_write, num_heads=3, implementation="mosaic",
        config=Config(block_n=64, block_k=64, stages=2),
    )  # fmt: skip
    agree(hopper.run(kernel, *given, num_sms=num_sms), want(given, 3), "bfloat16")


def test_ctas_that_share_the_depth_of_a_head(hopper):
    given = arrays(2, 1, 1, 128, 512, bias=True)
    tiling = Config(block_n=64, block_k=64, stages=2, split=2)
    agree(run(hopper, given, 1, config=tiling), want(given, 1), "bfloat16")


@pytest.mark.parametrize("H", [64, 128])
def test_more_tokens_than_places_in_registers(hopper, H):
    given = arrays(35, 1, 1, H, 64, absent=(3, 34))
    tiling = Config(block_n=64, block_k=64, stages=2)
    agree(run(hopper, given, 1, config=tiling), want(given, 1), given[0].dtype)


def test_absent_tokens_are_written_nowhere(hopper):
    given = arrays(4, 1, 1, 128, 64, absent=(1, 3))
    x, *rest = given
    x = x.at[1].set(jnp.nan)
    rest[6] = rest[6].at[1].set(10_000)
    rest[7] = rest[7].at[3].set(10_000)
    q, *pools = run(hopper, (x, *rest), 1)
    agree((q[jnp.array([0, 2])], *pools), (want(given, 1)[0][::2], *want(given, 1)[1:]), "bfloat16")


@pytest.mark.parametrize("implementation", ["mosaic", "separate", "xla"])
def test_tokens_outside_the_table_or_the_pool_are_written_nowhere(hopper, implementation):
    """Of nine requests with a token each, one lies in a page that exists."""
    given = astray(arrays(9, 1, 1, 128, 64))
    got = run(hopper, given, 1, implementation)
    agree(got, want(given, 1), "bfloat16")
    for pool, before in zip(got[1:], given[5:7], strict=True):
        assert changed_slots(pool, before) == STRAY_SLOTS & {(3, 14)}


def test_a_norm_that_is_not_divided(hopper):
    given = arrays(3, 2, 1, 128, 128)
    stream, weight = (
        normal(20, (3, 1, 128), "bfloat16", 3.0),
        normal(21, (64, 128), "bfloat16", 0.1),
    )
    norm = Norm(1 + normal(22, (128,), "bfloat16", 0.1), 1e-5)

    def both(stream, *rest, implementation):
        first = normal(23, (3, 1, 64), "bfloat16")
        _, normed = matmul_and_norm(
            first, weight, residual=stream, norm=norm, implementation=implementation
        )
        assert isinstance(normed, UndividedNorm) == (implementation == "mosaic")
        return project_rope_write(normed, *rest, num_heads=2, implementation=implementation)

    got = hopper.run(functools.partial(both, implementation="mosaic"), stream, *given[1:])
    other = jax.jit(functools.partial(both, implementation="xla"))(stream, *given[1:])
    for one, two in zip(got, other, strict=True):
        assert_dtype_close(
            np.asarray(one, np.float32) / 4, np.asarray(two, np.float32) / 4, "bfloat16"
        )


def test_pools_outside_the_call_keep_their_bits_and_runs_are_equal(hopper):
    given = arrays(2, 1, 1, 128, 64)
    before = [pool.copy() for pool in given[5:7]]
    same_bits(run(hopper, given, 1), run(hopper, given, 1))
    same_bits(given[5:7], before)


@pytest.mark.parametrize("H", [64, 128])
def test_values_stay_whatever_they_are(hopper, H):
    """Infinity spreads to no other element, and a head of zeros under a norm of eps 0 is no NaN."""
    x, weight, _, *rest = arrays(2, 1, 1, H, 64)
    weight = weight.at[:, 2 * H :].set(0.0)
    bias = jnp.zeros(3 * H, "bfloat16").at[2 * H + 5].set(jnp.inf)
    norms: Any = {name: Norm(jnp.ones(H, "bfloat16"), 0.0) for name in ("q_norm", "k_norm")}
    _, _, values = run(hopper, (x, weight, bias, *rest), 1, **norms)
    table, start = rest[4], rest[5]
    for b in range(2):
        row = values[table[b, start[b] // PAGE], 0, start[b] % PAGE]
        assert np.isinf(row[5])
        assert (np.delete(np.asarray(row, np.float32), 5) == 0).all()


@pytest.mark.gpu
def test_donated_pools_are_updated_in_place(hopper_gpu):
    given = arrays(2, 2, 1, 128, 256)
    expected = run(hopper_gpu, given, 2)
    call = functools.partial(project_rope_write, num_heads=2, implementation="mosaic")
    addresses = [given[i].unsafe_buffer_pointer() for i in (5, 6)]
    got = hopper_gpu.run(jax.jit(call, donate_argnums=(5, 6)), *given)
    assert [pool.unsafe_buffer_pointer() for pool in got[1:]] == addresses
    same_bits(got, expected)


@pytest.mark.parametrize(("B", "N", "K", "H", "D"), [
    (1, 32, 8, 128, 4096), (8, 32, 8, 128, 4096), (16, 32, 32, 128, 4096), (2, 8, 4, 256, 2560),
    (1, 4, 1, 256, 640), (1, 9, 3, 64, 576), (16, 14, 2, 64, 896),
])  # fmt: skip
@pytest.mark.parametrize("normed", [False, True])
def test_lowers(h100, B, N, K, H, D, normed):
    shapes = jax.eval_shape(lambda: arrays(B, N, K, H, D, bias=True))
    more = norms(H) if normed else {}
    call = functools.partial(project_rope_write, num_heads=N, implementation="mosaic", **more)
    text = plgpu.lower_for_cuda(call, *shapes, spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(("tiling", "B", "H", "fits"), [
    ("x1", 64, 64, True), ("x1", 64, 128, True), ("x1", 32, 256, True), ("x1", 64, 256, False),
    ("x2-r96", 64, 64, True), ("x1", 65, 64, False),
])  # fmt: skip
def test_many_tokens_lower(h100, tiling, B, H, fits):
    """Where their sums and the angles fit the registers."""
    config = one_launch_config(h100, Heads(4, 1, H), M=B, D=640, tiling=tiling)
    assert (config is not None) == fits
    if fits:
        shapes = jax.eval_shape(lambda: arrays(B, 4, 1, H, 640, bias=True))
        options: Any = {"num_heads": 4, "implementation": "mosaic", "config": config}
        call = functools.partial(project_rope_write, **options, **norms(H))
        plgpu.lower_for_cuda(call, *shapes, spec=h100)


@pytest.mark.parametrize("tiling", ONE_LAUNCH)
def test_heads_that_keep_memory_busy_are_not_shared(h100, tiling):
    """CTAs that share a depth are for few heads."""
    config = one_launch_config(h100, Heads(32, 32, 128), M=1, D=4096, tiling=tiling)
    assert (config is None) == tiling.startswith("x2")


@pytest.mark.parametrize("tiling", ONE_LAUNCH)
@pytest.mark.parametrize("spec", cases([spec for spec in SPECS if spec.B == 8]))
def test_tilings_that_compete_lower(h100, spec, tiling):
    heads = Heads(spec.N, spec.K, spec.H)
    config = one_launch_config(h100, heads, M=spec.B, D=spec.D, tiling=tiling)
    options: Any = {"num_heads": spec.N, "implementation": "mosaic", "config": config}
    call = functools.partial(project_rope_write, **options, **norms(spec.H))
    text = plgpu.lower_for_cuda(call, *shapes_of(make_inputs, spec), spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("tiling", ONE_LAUNCH)
@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_tilings_that_compete_agree(hopper, spec, tiling):
    given = inputs(make_inputs, spec, 1)
    config = one_launch_config(
        H100, Heads(spec.N, spec.K, spec.H), M=spec.B, D=spec.D, tiling=tiling
    )
    agree(run(hopper, given, spec.N, config=config), want(given, spec.N), spec.dtype)


@pytest.mark.parametrize(("sizes", "argument"), [
    ((65, 1, 1, 128, 64), "65 tokens with their projection"),
    ((64, 1, 1, 256, 64), "64 tokens with their projection; supported: 1 to 32"),
    ((2, 2, 2, 32, 64), "head_dim 32 with the projection"),
])  # fmt: skip
def test_what_one_launch_cannot_do_two_ops_do(h100, sizes, argument):
    given = arrays(*sizes)
    with pytest.raises(NotSupported, match=re.escape(argument)):
        project_rope_write(*given, num_heads=sizes[1], implementation="mosaic")
    either = ("mosaic", "separate")
    jax.eval_shape(lambda: project_rope_write(*given, num_heads=sizes[1], implementation=either))
    assert choices()["project_rope_write"].implementation == "separate"


def test_tiles_must_be_heads(h100):
    with pytest.raises(ValueError, match="block_n must be 64 for head_dim 64; got 128"):
        project_rope_write(
            *arrays(2, 1, 1, 64, 64), num_heads=1, implementation="mosaic",
            config=Config(block_n=128, block_k=64),
        )  # fmt: skip


def test_one_launch_needs_hopper():
    with use_device(CPU), pytest.raises(NotSupported, match="device 'cpu'"):
        project_rope_write(*arrays(1, 1, 1, 128, 64), num_heads=1, implementation="mosaic")


@pytest.mark.parametrize(("sizes", "order"), [
    ((1, 32, 8, 128, 4096), "mosaic"),
    ((1, 32, 32, 128, 4096), "separate"),  # heads enough
    ((17, 32, 8, 128, 4096), "separate"),
    ((8, 9, 3, 64, 576), "mosaic"),  # a small weight
    ((8, 4, 1, 256, 640), "separate"),  # of wide heads
    ((1, 40, 8, 80, 5120), "separate"),
])  # fmt: skip
def test_one_launch_is_chosen_where_it_pays(h100, sizes, order):
    B, N, K, H, D = sizes
    with_projection = functools.partial(config.with_projection, M=B, D=D)
    assert with_projection(h100, Heads(N, K, H))[0] == order
    assert with_projection(CPU, Heads(N, K, H))[0] == "separate"


def test_a_tiling_is_for_the_product_alone(h100):
    shapes = jax.eval_shape(lambda: arrays(1, 32, 8, 128, 4096))
    tiling = Config(block_n=128, block_k=64)
    jax.eval_shape(functools.partial(project_rope_write, num_heads=32), *shapes)
    assert choices()["project_rope_write"].implementation == "mosaic"
    call = functools.partial(project_rope_write, num_heads=32, config=tiling)
    jax.eval_shape(call, *shapes)
    assert choices()["project_rope_write"].implementation == "separate"


@pytest.mark.parametrize("op", ["matmul", "add_rms_norm", "rope_kv_write"])
def test_each_of_the_ops_can_be_switched_off(h100, monkeypatch, op):
    """Then all are calls of their own, so that a benchmark shows what one is worth."""
    monkeypatch.setattr(config, "LARGE", 0)
    given = arrays(1, 2, 1, 128, 512)
    jax.eval_shape(lambda: project_rope_write(*given, num_heads=2))
    assert choices()["project_rope_write"].implementation == "mosaic"
    with force_implementation("xla", op=op):
        jax.eval_shape(lambda: project_rope_write(*given, num_heads=2, **norms(128)))
    assert choices()["project_rope_write"].implementation == "separate"
    assert choices()[op].implementation == "xla"


def test_norms_of_the_stream_are_not_its_own(h100, monkeypatch):
    """Whoever forces them, where heads have none, keeps the one launch."""
    monkeypatch.setattr(config, "LARGE", 0)
    given = arrays(1, 2, 1, 128, 512)
    with force_implementation("xla", op="add_rms_norm"):
        jax.eval_shape(lambda: project_rope_write(*given, num_heads=2))
    assert choices()["project_rope_write"].implementation == "mosaic"


def test_everything_in_plain_jax(h100):
    given = arrays(1, 2, 1, 128, 128)
    with force_implementation("xla"):
        jax.eval_shape(lambda: project_rope_write(*given, num_heads=2))
    names = ("project_rope_write", "matmul", "rope_kv_write")
    assert [choices()[name].implementation for name in names] == ["xla"] * 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("given", "message"), [
    ({"q_norm": Norm(np.ones(128))}, "q_norm and k_norm must both be given, or neither"),
    ({"q_norm": Norm(np.ones(128)), "k_norm": Norm(np.ones(64))},
     "k_norm.weight must have shape (128,); got (64,)"),
    ({"q_norm": Norm(np.ones(128)), "k_norm": Norm(np.ones(128), -1.0)},
     "k_norm.eps must not be negative; got -1.0"),
], ids=["one", "narrow", "eps"])  # fmt: skip
def test_norms_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        project_rope_write(*arrays(1, 2, 1, 128, 64), num_heads=2, **given)


@pytest.mark.usefixtures("unchecked")
def test_columns_that_are_not_the_heads():
    given = arrays(1, 2, 1, 128, 64)
    with pytest.raises(ValueError, match=re.escape("weight must have (N + 2·K)·H = 640 columns")):
        project_rope_write(*given, num_heads=3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [
    ({"q_norm": 3, "k_norm": 3}, "q_norm must be a Norm; got int"),
    ({"config": 3}, "matmul.shape.Config; got int"),
    ({"page_table": [[0]]}, "page_table must be an array; got list"),
    ({"k_pages": None}, "k_pages must be an array; got None"),
], ids=["norm", "config", "table", "pages"])  # fmt: skip
def test_types_that_do_not_fit(changes, message):
    names = inspect.signature(project_rope_write).parameters
    given = dict(zip(names, arrays(1, 2, 1, 128, 64), strict=False))
    with pytest.raises(TypeError, match=re.escape(message)):
        project_rope_write(**given | {"num_heads": 2} | changes)


@pytest.mark.usefixtures("unchecked")
def test_arrays_of_numpy_are_taken():
    given = arrays(2, 2, 1, 128, 64)
    plain: Any = [None if x is None else np.asarray(x) for x in given]
    same_bits(project_rope_write(*plain, num_heads=2), project_rope_write(*given, num_heads=2))
