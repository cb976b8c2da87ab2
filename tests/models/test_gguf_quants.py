"""Every quantisation type against the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models.checkpoint import gguf_quants
from jaxinfer.models.checkpoint.gguf_quants import BLOCK_TYPES, dequantize, dequantize_rows
from tests.models.gguf_files import Kind

FLOATS = {"F32": np.float32, "F16": np.float16}
# Bytes of each block that are half-precision scales: random ones would be NaN or infinite.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_bytes(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Any bytes are a quantised matrix: every quant, every scale and minimum occurs."""
    rng = np.random.default_rng(seed)
    if kind == "BF16":
        bits = rng.normal(size=(rows, columns)).astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8)
    if kind in FLOATS:
        return rng.normal(size=(rows, columns)).astype(FLOATS[kind]).view(np.uint8)
    block = BLOCK_TYPES[kind]
    raw = rng.integers(0, 256, (rows, columns // block.numbers, block.size_bytes), np.uint8)
    for place in HALVES[kind]:
        scales = rng.normal(0, 0.1, raw.shape[:2]).astype(np.float16)
        raw[..., place : place + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def reference(raw: np.ndarray, kind: str) -> np.ndarray:
    data = raw.view(FLOATS[kind]) if kind in FLOATS else raw
    return gguf.dequantize(data, Kind[kind])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (300, 768)])
def test_equal_to_the_reference(kind, shape):
    raw = random_bytes(kind, *shape)
    want = reference(raw, kind)
    assert np.isfinite(want).all()
    got = dequantize_rows(raw, kind, shape)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(dequantize(raw, kind, shape), want.T)


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if not k.endswith("_K")])
def test_what_the_package_quantises(kind):
    """Real numbers there and back: as near as the type allows."""
    values = np.random.default_rng(1).normal(size=(16, 256)).astype(np.float32)
    stored = gguf.quantize(values, Kind[kind]).view(np.uint8).reshape(16, -1)
    got = dequantize_rows(stored, kind, values.shape)
    np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(values, Kind[kind]),
                                                       Kind[kind]))  # fmt: skip
    step = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(kind, 0.4)
    assert np.abs(got - values).max() <= step


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(BLOCK_TYPES)),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    piece=st.sampled_from([1, 300, 4096, 1 << 19]),
    seed=st.integers(0, 1000),
)
def test_pieces_and_threads_do_not_matter(kind, rows, blocks, piece, seed):
    shape = (rows, blocks * 256)
    raw = random_bytes(kind, *shape, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_quants, "_PIECE", piece)
        got = dequantize(raw, kind, shape)
    np.testing.assert_array_equal(got, reference(raw, kind).T)


def test_sizes_of_blocks_are_those_of_the_package():
    for kind, block in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[Kind[kind]] == (block.numbers, block.size_bytes)


def test_results_can_be_used_without_a_copy():
    """JAX on a CPU takes memory that begins at a multiple of 64 bytes."""
    for rows in (1, 3, 17):
        assert (
            dequantize(random_bytes("Q4_K", rows, 256), "Q4_K", (rows, 256)).ctypes.data % 64 == 0
        )
