"""From files straight into the parts of several devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import prefill
from tests.metrics import assert_close
from tests.models.families import random_model, random_weights
from tests.models.gguf_files import write_model
from tests.models.huggingface_files import write_directory
from tests.ops.cases import quick_compilation


def assert_same(got: Decoder, want: Decoder) -> None:
    pairs = zip(got.canonical_weights(), want.canonical_weights(), strict=True)
    for (name, mine), (other, theirs) in pairs:
        assert name == other
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs), err_msg=name)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face(tmp_path, name, dtype):
    """Converted on the host to what one device converts them to."""
    checkpoint = open_checkpoint(write_directory(tmp_path / name, name, shards=2))
    seen = []
    model = load_model(
        checkpoint, dtype=jnp.dtype(dtype), mesh="tensor=4", progress=lambda *at: seen.append(at)
    )
    assert_same(model, load_model(checkpoint, dtype=jnp.dtype(dtype)))
    assert model.embed[...].dtype == dtype
    assert seen[-1][1] == seen[-1][2] == len(seen)


def test_gguf(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", "llama"))
    assert_same(load_model(checkpoint, mesh="tensor=3"), load_model(checkpoint))


def test_a_divided_model_is_written_whole(tmp_path):
    save_orbax(tmp_path / "model", random_model("qwen3").divide("tensor=4"))
    checkpoint = open_checkpoint(tmp_path / "model")
    model = load_model(checkpoint, dtype=jnp.float32, mesh="tensor=2")
    assert_same(model, random_model("qwen3"))


def test_what_several_devices_have_is_read_once():
    """Along `seq` all have the same weights."""
    read = 0

    class Watched:
        """An array in a file, of which only slices are taken."""

        def __init__(self, weight: np.ndarray):
            self.shape, self._weight = weight.shape, weight

        def __getitem__(self, index) -> np.ndarray:
            nonlocal read
            part = self._weight[index]
            read += part.size
            return part

        def __array__(self, *_, **__) -> np.ndarray:
            return self[...]

    weights, config = random_weights("qwen2"), random_model("qwen2").config
    for mesh in ("seq=4", "seq=4,tensor=2", "data=2,seq=2,tensor=2"):
        read = 0
        watch: Any = lambda name: Watched(weights[name])
        model = Decoder.from_weights(config, watch, dtype=jnp.float32, mesh=mesh)
        # Six heads on two devices are three each, and no head is on both.
        assert read == sum(weight.size for weight in weights.values())
        for name, array in model.canonical_weights():
            np.testing.assert_array_equal(np.asarray(array), weights[name])


def test_a_weight_of_another_shape():
    weights = dict(random_weights("llama"))
    weights["layers.1.k_proj"] = weights["layers.1.k_proj"][:, :-1]
    with pytest.raises(ValueError, match=r"weight layers\.1\.k_proj must have shape \(48, 32\)"):
        Decoder.from_weights(random_model("llama").config, weights.__getitem__, mesh="tensor=2")


def test_a_mesh_that_cannot_be_is_no_fault_of_the_file(tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path / "model", "llama"))
    with pytest.raises(ValueError, match="needs 9 devices; there are 8") as caught:
        load_model(checkpoint, mesh="tensor=9")
    assert type(caught.value) is ValueError


def test_bfloat16():
    """Every part is rounded before the sum, and a device's sums are those of fewer products.

    Two layers of a stream that is rounded at 2^-9 many times. Seen: 9.9e-3 on one device, 9.7e-3 on
    three.
    """
    scores = {}
    for dtype, mesh in (("float32", None), ("bfloat16", None), ("bfloat16", "tensor=3")):
        model = Decoder.from_weights(
            random_model("qwen2").config, random_weights("qwen2").__getitem__,
            dtype=jnp.dtype(dtype), mesh=mesh,
        )  # fmt: skip
        cache = PagedKVCache.create(
            model.config, batch_size=1, max_len=16, page_size=16, dtype=jnp.dtype(dtype),
            parallel=model.parallel,
        )  # fmt: skip
        ids = jnp.asarray([[5, 17, 3, 96, 41, 41, 8, 0, 77]])
        with quick_compilation():
            got, _ = jax.jit(prefill, static_argnames="fresh")(model, ids, cache, fresh=True)
        scores[dtype, mesh] = np.asarray(got)
    for mesh in (None, "tensor=3"):
        assert_close(
            scores["bfloat16", mesh], scores["float32", None], rms=2e-2, max_abs=0.1,
            label=str(mesh),
        )  # fmt: skip
