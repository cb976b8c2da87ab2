"""GGUF files: what the metadata mean, where weights are, and what may be wrong."""

import contextlib
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.models.checkpoint.gguf import GGUFCheckpoint
from jaxinfer.models.checkpoint.gguf_file import GGUFFile
from jaxinfer.models.checkpoint.gguf_quants import BLOCK_TYPES
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from tests.models.families import CONFIGS, random_weights
from tests.models.gguf_files import (
    ARCHITECTURES,
    Kind,
    metadata,
    permuted,
    stored_tensors,
    write,
    write_model,
)
from tests.models.logits import assert_config, assert_logits
from tests.models.test_gguf_quants import random_bytes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shape_and_logits_of_every_architecture(name, tmp_path):
    opened = open_checkpoint(write_model(tmp_path / "model.gguf", name))
    assert isinstance(opened, GGUFCheckpoint)
    assert_config(opened.config, CONFIGS[name])
    assert_logits(opened, name)


def test_the_permutation_is_that_of_the_converter():
    """`reshape(heads, 2, H/2, …).swapaxes(1, 2)`, as llama.cpp's conversion script has it."""
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    want = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    np.testing.assert_array_equal(permuted(rows, 8), want)


def quantised(kind: str, tmp_path) -> tuple[GGUFCheckpoint, dict[str, np.ndarray]]:
    """A llama of 256 columns whose matrices have one type, and the dequantised tensors."""
    sizes = {
        "llama.context_length": 64, "llama.embedding_length": 256, "llama.block_count": 1,
        "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    shapes = {
        "token_embd.weight": (40, 256), "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_k.weight": (128, 256), "blk.0.attn_v.weight": (128, 256),
        "blk.0.attn_output.weight": (256, 256), "blk.0.ffn_gate.weight": (512, 256),
        "blk.0.ffn_up.weight": (512, 256), "blk.0.ffn_down.weight": (256, 512),
    }  # fmt: skip
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
    tensors = {
        key: random_bytes(kind, *shape, seed=i).view(dtype)
        for i, (key, shape) in enumerate(shapes.items())
    }
    want = {key: gguf.dequantize(raw, Kind[kind]) for key, raw in tensors.items()}
    norms = {key: np.ones(256, np.float32)
             for key in ("output_norm.weight", "blk.0.attn_norm.weight",
                         "blk.0.ffn_norm.weight")}  # fmt: skip
    kinds = {} if dtype is not np.uint8 else dict.fromkeys(tensors, Kind[kind])
    path = write(tmp_path / "model.gguf", sizes, tensors | norms, kinds=kinds)
    return GGUFCheckpoint(path), want


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_weights_of_every_quantisation_type(kind, tmp_path):
    """Rows of Q and K are put in order while they are quantised."""
    opened, want = quantised(kind, tmp_path)
    assert opened.config.tie_embeddings
    np.testing.assert_array_equal(opened.read("embed"), want["token_embd.weight"])
    np.testing.assert_array_equal(
        opened.read("layers.0.down_proj"), want["blk.0.ffn_down.weight"].T
    )
    for part in ("q", "k"):
        got = opened.read(f"layers.0.{part}_proj").T
        np.testing.assert_array_equal(permuted(got, 64), want[f"blk.0.attn_{part}.weight"])
    load_model(opened)


def read_config(tmp_path, name: str, **fields) -> DecoderConfig:
    return open_checkpoint(write_model(tmp_path / "model.gguf", name, **fields)).config


def test_gemma3_files_say_little(tmp_path):
    """Published files lack the pattern, the local base, and the factor on embeddings."""
    config = read_config(tmp_path, "gemma3", attention__sliding_window_pattern=None,
                         block_count=4)  # fmt: skip
    assert config.local_layers == (True,) * 4  # the sixth would be global
    assert (config.local_rope_theta, config.sliding_window) == (1e4, 5)
    assert config.embedding_scale == pytest.approx(48**0.5)
    assert (config.activation, config.qk_norm, config.sandwich_norms) == ("gelu_tanh", True, True)


def test_defaults(tmp_path):
    config = read_config(
        tmp_path, "llama", attention__key_length=None, attention__value_length=None,
        rope__freq_base=None, attention__head_count_kv=None,
    )  # fmt: skip
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (8, 6, 1e4)


def llama31_factors(factor: float, *, head_dim: int = 16, theta: float = 10_000.0) -> np.ndarray:
    """Divisor of every frequency, as the converter of Llama 3.1 writes them."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama31_are_recognised(factor, tmp_path):
    divisors = {"rope_freqs.weight": llama31_factors(factor)}
    got = read_config(tmp_path, "llama", extra_tensors=divisors).rope_scaling
    assert got == RopeScaling(
        rope_type="llama3", factor=factor, original_max_position_embeddings=8192,
        low_freq_factor=1.0, high_freq_factor=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("change", [lambda f: f[:4], lambda f: f * [1, 1, 1, 1, 1, 1, 1.2, 1]])
def test_other_factors_are_refused(change, tmp_path):
    divisors = {"rope_freqs.weight": change(llama31_factors(8.0)).astype(np.float32)}
    with pytest.raises(
        UnsupportedModelError, match=r"rope_freqs\.weight does not hold the factors"
    ):
        read_config(tmp_path, "llama", extra_tensors=divisors)


def test_magnitude_of_yarn(tmp_path):
    """The file's factor multiplies YaRN's 0.1 ln(s) + 1."""
    plain = read_config(tmp_path, "llama-yarn").rope_scaling
    assert plain is not None
    assert plain.attention_factor is None
    scaled = read_config(tmp_path, "llama-yarn", rope__scaling__yarn_attn_factor=0.5).rope_scaling
    assert scaled is not None
    assert scaled.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


def test_end_tokens(tmp_path):
    ids = {f"tokenizer.ggml.{key}_token_id": i for key, i in
           (("eos", 2), ("eot", 7), ("eom", 2))}  # fmt: skip
    opened = open_checkpoint(write_model(tmp_path / "model.gguf", "llama", tokenizer=ids))
    assert opened.generation.eos_token_ids == (2, 7)


class TestRefusals:
    """What is not implemented is named, with what is."""

    def refused(self, tmp_path, match, name="llama", **fields):
        with pytest.raises(UnsupportedModelError, match=match) as raised:
            read_config(tmp_path, name, **fields)
        assert "model.gguf" in str(raised.value)

    def test_architecture(self, tmp_path):
        path = write(tmp_path / "model.gguf", {}, stored_tensors("llama"), architecture="mamba")
        with pytest.raises(
            UnsupportedModelError, match=r"'mamba' is not .*: llama, qwen2, qwen3, gemma3"
        ):
            open_checkpoint(path)

    @pytest.mark.parametrize("kind", [k for k in gguf.GGML_QUANT_SIZES if k.name.startswith("IQ")])
    def test_quantisation(self, kind, tmp_path):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        tensor = {"token_embd.weight": np.zeros((8, 256 // block * size), np.uint8)}
        path = write(tmp_path / "model.gguf", {}, tensor, kinds={"token_embd.weight": kind})
        with pytest.raises(
            UnsupportedModelError, match=rf"type {kind.name} \(tensor token_embd.*Q6_K"
        ):
            open_checkpoint(path)

    def test_experts(self, tmp_path):
        self.refused(tmp_path, "mixtures of experts", expert_count=8)

    def test_rope_scaling(self, tmp_path):
        self.refused(tmp_path, "'longrope'.*linear, yarn", rope__scaling__type="longrope")
        self.refused(
            tmp_path, "yarn_log_multiplier = 0.5", "llama-yarn",
            rope__scaling__yarn_log_multiplier=0.5,
        )  # fmt: skip

    def test_heads_of_two_sizes(self, tmp_path):
        self.refused(tmp_path, "attention.value_length = 32", attention__value_length=32)
        self.refused(tmp_path, "rope.dimension_count = 8", rope__dimension_count=8)

    def test_a_later_version(self, tmp_path):
        path = write_model(tmp_path / "model.gguf", "llama")
        data = bytearray(path.read_bytes())
        data[4] = 9
        path.write_bytes(data)
        with pytest.raises(UnsupportedModelError, match=r"version 9 is not .*2 and 3"):
            open_checkpoint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file whose header has 3000 bytes or more."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write_model(path, "gemma3").read_bytes()


class TestDamage:
    """A file that is not whole, or contradicts itself, is refused with its name."""

    def refused(self, path, match):
        with pytest.raises(CheckpointError, match=match) as raised:
            load_model(open_checkpoint(path))
        assert path.name in str(raised.value)

    @pytest.mark.parametrize("keep", [0, 2, 4, 10, 24, 100, 700, 5000, -1])
    def test_truncated(self, keep, tmp_path):
        path = write_model(tmp_path / "model.gguf", "llama")
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path, "model.gguf: truncated or corrupt GGUF file")

    @pytest.mark.parametrize("beyond", [3, 8, 9])
    def test_truncated_within_an_array_of_strings(self, beyond, tmp_path):
        """In the length of its last text, before the text, and in its one character."""
        path = write_model(tmp_path / "model.gguf", "llama", tags=["a" * 90] * 9 + ["\N{SNOWMAN}"])
        data = path.read_bytes()
        last = data.index("\N{SNOWMAN}".encode()) - 8
        path.write_bytes(data[: last + beyond])
        self.refused(
            path, f"corrupt GGUF file: the header goes on after the last byte, {last + beyond}"
        )

    def test_something_else(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(b"PK\x03\x04 a zip file")
        self.refused(path, r"not a GGUF file \(it starts with b'PK")

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
            GGUFFile(tmp_path / "absent.gguf")

    def moved(self, tmp_path, change) -> Path:
        """A file in which the offset of `output_norm.weight` is changed."""
        path = write_model(tmp_path / "model.gguf", "llama")
        data = bytearray(path.read_bytes())
        name = b"output_norm.weight"
        # Behind the name: the number of axes, one size, the type, and the offset.
        at = data.index(name) + len(name) + 4 + 8 + 4
        [offset] = struct.unpack_from("<Q", data, at)
        struct.pack_into("<Q", data, at, change(offset))
        path.write_bytes(data)
        return path

    def test_an_offset_that_is_not_aligned(self, tmp_path):
        self.refused(
            self.moved(tmp_path, lambda offset: offset + 1),
            r"tensor output_norm\.weight has offset \d+, which is no multiple of 32",
        )

    def test_tensors_that_overlap(self, tmp_path):
        self.refused(
            self.moved(tmp_path, lambda offset: offset - 32),
            r"tensor \S+ ends at byte \d+, but output_norm\.weight begins at \d+",
        )

    @pytest.mark.parametrize("offset", [2**32, 2**64 - 32])
    def test_a_tensor_behind_the_end(self, offset, tmp_path):
        self.refused(
            self.moved(tmp_path, lambda _: offset),
            r"tensor output_norm\.weight ends at byte \d+, the file at",
        )

    @pytest.mark.parametrize("value", [0, 4, 36, "32", True, 32.0])
    def test_an_alignment_that_is_none(self, value, tmp_path):
        alignment = {"general.alignment": value}
        path = write_model(tmp_path / "model.gguf", "llama", tokenizer=alignment)
        self.refused(path, r"general\.alignment must be a positive multiple of 8; got ")

    @pytest.mark.parametrize(
        "field", [key for key in metadata("llama") if "length" in key or "count" in key]
    )
    def test_a_size_of_zero(self, field, tmp_path):
        path = write_model(tmp_path / "model.gguf", "llama", fields={field: 0})
        self.refused(path, f"metadata 'llama.{field}' must be a whole number of at least 1; got 0")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, "many", [1.0]])
    @pytest.mark.parametrize(
        ("name", "field"),
        [
            ("llama", "attention.layer_norm_rms_epsilon"), ("llama", "rope.freq_base"),
            ("llama", "attention.key_length"), ("llama", "attention.head_count_kv"),
            ("llama-yarn", "rope.scaling.factor"), ("llama-yarn", "rope.scaling.yarn_beta_fast"),
            ("gemma3", "attention.sliding_window"), ("gemma3", "attn_logit_softcapping"),
        ],
    )  # fmt: skip
    def test_a_number_that_is_none(self, name, field, value, tmp_path):
        path = write_model(tmp_path / "model.gguf", name, fields={field: value})
        architecture = ARCHITECTURES[name]
        self.refused(path, f"metadata '{architecture}.{field}' must be .*; got ")

    @pytest.mark.parametrize("count", [1, 2**31])
    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    def test_layers_that_are_not_there(self, name, count, tmp_path):
        """Before anything is made for each of them."""
        path = write_model(tmp_path / "model.gguf", name, fields={"block_count": count})
        there = CONFIGS[name].num_layers
        self.refused(
            path, f"'{name}.block_count' is {count}, but the file holds tensors of {there} blocks"
        )

    @pytest.mark.parametrize(
        "field",
        ["context_length", "embedding_length", "block_count", "feed_forward_length",
         "attention.head_count", "attention.layer_norm_rms_epsilon"],
    )  # fmt: skip
    def test_a_field_that_is_missing(self, field, tmp_path):
        path = write_model(tmp_path / "model.gguf", "llama", fields={field: None})
        self.refused(path, f"metadata 'llama.{field}' is missing")

    def test_no_architecture(self, tmp_path):
        path = write_model(tmp_path / "model.gguf", "llama")
        data = path.read_bytes().replace(b"general.architecture", b"general.architectura")
        path.write_bytes(data)
        self.refused(path, "'general.architecture' is missing")

    @pytest.mark.parametrize(
        "tensor", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight"]
    )
    def test_a_tensor_that_is_missing(self, tensor, tmp_path):
        self.refused(
            write_model(tmp_path / "model.gguf", "llama", without=(tensor,)),
            f"tensor {tensor} is missing",
        )

    def test_a_tensor_of_another_shape(self, tmp_path):
        other = {"blk.0.ffn_up.weight": np.zeros((80, 64), np.float32)}
        path = write_model(tmp_path / "model.gguf", "llama", extra_tensors=other)
        self.refused(path, r"layers.0.up_proj must have shape \(48, 80\); got \(64, 80\)")

    def test_queries_that_do_not_fill_heads(self, tmp_path):
        other = {"blk.0.attn_q.weight": np.zeros((90, 48), np.float32)}
        path = write_model(tmp_path / "model.gguf", "llama", extra_tensors=other)
        with pytest.raises(CheckpointError, match="90 rows of Q or K are no multiple of H = 16"):
            load_model(open_checkpoint(path))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(at=st.integers(0, 3000), value=st.integers(0, 255))
    def test_any_byte_of_the_header_may_be_wrong(self, whole, tmp_path_factory, at, value):
        """It is read as something else or refused; nothing breaks in another way."""
        data = bytearray(whole)
        data[at] = value
        path = tmp_path_factory.getbasetemp() / "damaged.gguf"
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            opened = open_checkpoint(path)
            opened.read("layers.0.q_proj")
            opened.read("final_norm")


@pytest.mark.parametrize("alignment", [8, 128])
def test_another_alignment(alignment, tmp_path):
    fields = {f"llama.{key}": value for key, value in metadata("llama").items()}
    path = write(tmp_path / "a.gguf", fields, stored_tensors("llama"), alignment=alignment)
    opened = open_checkpoint(path)
    for weight, want in random_weights("llama").items():
        np.testing.assert_array_equal(opened.read(weight), want)


def test_tied_or_not(tmp_path):
    """Without `output.weight` the embedding is the output too."""
    untied = open_checkpoint(write_model(tmp_path / "a.gguf", "llama"))
    assert not untied.config.tie_embeddings
    np.testing.assert_array_equal(untied.read("lm_head"), random_weights("llama")["lm_head"])
    tied = open_checkpoint(write_model(tmp_path / "b.gguf", "llama", without=("output.weight",)))
    assert tied.config.tie_embeddings
    assert load_model(tied).lm_head is None
