"""Parts of a converted model's weights: nothing else is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.checkpoint.open import open_checkpoint
from jaxinfer.models.checkpoint.orbax import OrbaxCheckpoint, save_orbax
from jaxinfer.models.checkpoint.orbax_parts import StoredArray
from jaxinfer.models.checkpoint.orbax_write import write_weights
from jaxinfer.models.errors import CheckpointError
from tests.models.families import random_model, random_weights


def bytes_read() -> int:
    """From files, by TensorStore, so far."""
    import tensorstore

    name = "/tensorstore/kvstore/file/bytes_read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in metrics for value in metric["values"])


@pytest.mark.parametrize("index", [np.s_[:512], np.s_[:, 512:1024], np.s_[512:1024, :]])
def test_a_quarter_of_an_array_is_a_quarter_of_its_bytes(tmp_path, index):
    whole = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    write_weights(tmp_path / "weights", {"a.b": whole})
    stored = StoredArray(tmp_path / "weights", "a.b")
    assert (stored.shape, stored.dtype) == (whole.shape, whole.dtype)
    before = bytes_read()
    np.testing.assert_array_equal(stored[index], whole[index])
    assert 0.2 * whole.nbytes < bytes_read() - before < 0.26 * whole.nbytes


def test_bfloat16_and_all_of_an_array(tmp_path):
    whole = jnp.arange(99, dtype=jnp.bfloat16).reshape(9, 11)
    write_weights(tmp_path / "weights", {"a": whole})
    stored = StoredArray(tmp_path / "weights", "a")
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(whole))
    assert np.asarray(stored, np.float32).dtype == np.float32
    np.testing.assert_array_equal(stored[2:4, 10], np.asarray(whole)[2:4, 10])


@pytest.fixture
def opened(tmp_path) -> OrbaxCheckpoint:
    save_orbax(tmp_path / "model", random_model("qwen2"))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert isinstance(checkpoint, OrbaxCheckpoint)
    return checkpoint


def test_every_weight_of_a_model(opened):
    for name, weight in random_weights("qwen2").items():
        np.testing.assert_array_equal(opened.read_part(name)[...], weight)


def test_a_weight_that_is_missing(opened):
    with pytest.raises(CheckpointError, match=r"weights: weight layers\.9\.q_proj is missing"):
        opened.read_part("layers.9.q_proj")


def test_every_file_is_checked_by_one_of_the_processes(opened, tmp_path, monkeypatch):
    """By that one alone: together they read everything once."""
    files = [path for path in (tmp_path / "model" / "weights").rglob("*") if path.is_file()]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for file in files:
        right = file.read_bytes()
        wrong = bytearray(right)
        wrong[len(wrong) // 2] ^= 1
        file.write_bytes(wrong)
        found = []
        for process in range(3):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            try:
                OrbaxCheckpoint(tmp_path / "model")._check_share()
            except CheckpointError as error:
                found.append(str(error))
        assert len(found) == 1
        assert f"{file.name}: corrupt: its checksum" in found[0]
        file.write_bytes(right)
