"""Hugging Face directories: weights, shards, defaults, and what may be wrong with them."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.models.checkpoint.huggingface import HuggingFaceCheckpoint
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from tests.models.families import CONFIGS, random_weights
from tests.models.huggingface_files import (
    FIELDS,
    config_json,
    stored_tensors,
    write_directory,
    write_json,
)
from tests.models.logits import assert_config, assert_logits


@pytest.mark.parametrize("name", FIELDS)
def test_shape_and_logits_of_every_family(name, tmp_path):
    opened = open_checkpoint(write_directory(tmp_path, name))
    assert isinstance(opened, HuggingFaceCheckpoint)
    assert_config(opened.config, CONFIGS[name])
    assert_logits(opened, name)


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_shards_hold_the_same(name, tmp_path):
    opened = open_checkpoint(write_directory(tmp_path, name, shards=3))
    for weight, want in random_weights(name).items():
        got = opened.read(weight)
        # Gemma's norms are stored less one: the last bit may differ.
        np.testing.assert_allclose(got, want, rtol=2e-7 if "norm" in weight else 0)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_decoder_within_a_model_that_also_sees(prefix, tmp_path):
    """Older files and newer ones; the tensors of the vision tower are not looked at."""
    nested = config_json("gemma3")
    architecture = ["Gemma3ForConditionalGeneration"]
    write_json(tmp_path / "config.json", {"architectures": architecture, "text_config": nested})
    vision = {"vision_tower.embeddings.weight": np.zeros((2, 2), np.float32)}
    save_file(stored_tensors("gemma3", prefix) | vision, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert_config(opened.config, CONFIGS["gemma3"])
    assert_logits(opened, "gemma3")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.inv_freq"),
        ("llama-tied-mqa", "lm_head.weight"),
        ("gemma3", "lm_head.weight"),
        ("gemma3", "multi_modal_projector.mm_soft_emb_norm.weight"),
        ("gemma3", "model.vision_tower.vision_model.embeddings.patch_embedding.bias"),
    ],
)
def test_tensors_that_files_hold_for_nothing(name, tensor, tmp_path):
    write_directory(tmp_path, name)
    extra = {tensor: np.zeros(8, np.float32)}
    save_file(stored_tensors(name) | extra, tmp_path / "model.safetensors")
    assert_logits(open_checkpoint(tmp_path), name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_halves_are_read_in_their_own_dtype(dtype, tmp_path):
    write_directory(tmp_path, "llama")
    tensors = {key: array.astype(dtype) for key, array in stored_tensors("llama").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    got = open_checkpoint(tmp_path).read("layers.1.down_proj")
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, random_weights("llama")["layers.1.down_proj"].astype(dtype))


def test_unaligned_tensors(tmp_path):
    """The format does not align offsets: an odd one comes behind a header of odd length."""
    write_directory(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip() + b" "
    header += b" " if len(header) % 2 == 0 else b""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert_logits(open_checkpoint(tmp_path), "llama")


def test_progress_counts_weights(tmp_path):
    seen = []
    load_model(
        open_checkpoint(write_directory(tmp_path, "llama")), progress=lambda *s: seen.append(s)
    )
    assert [done for _, done, _ in seen] == list(range(1, len(random_weights("llama")) + 1))
    assert {total for _, _, total in seen} == {len(seen)}


@pytest.mark.parametrize(
    ("file", "config", "ids"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 3}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {}, ()),
    ],
)
def test_tokens_that_end_an_answer(file, config, ids, tmp_path):
    write_directory(tmp_path, "llama", **config)
    if file is not None:
        write_json(tmp_path / "generation_config.json", file)
    assert open_checkpoint(tmp_path).generation.eos_token_ids == ids


def test_recommended_sampling(tmp_path):
    write_directory(tmp_path, "qwen2")
    assert open_checkpoint(tmp_path).generation.sampling == {}
    wanted = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    other = {"do_sample": True, "transformers_version": "4.51.0", "pad_token_id": 3, "min_p": None}
    write_json(tmp_path / "generation_config.json", wanted | other)
    assert open_checkpoint(tmp_path).generation.sampling == wanted


@pytest.mark.parametrize(
    ("file", "want"),
    [
        # Gemma 3's: without a temperature, Hugging Face draws at 1.
        ({"do_sample": True, "top_k": 64, "top_p": 0.95},
         {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"top_p": 0.9, "temperature": None}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": None, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {"temperature": 0.0, "top_k": 5}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"eos_token_id": 3}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_whether_the_recommendation_samples(file, want, tmp_path):
    write_directory(tmp_path, "llama")
    write_json(tmp_path / "generation_config.json", file)
    assert open_checkpoint(tmp_path).generation.sampling == want


def rewrite(path, change):
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


class TestDamage:
    """Each thing that may be wrong is named, with the file it is in."""

    def refused(self, folder, match, weight=None, error=CheckpointError):
        def read():
            opened = open_checkpoint(folder)
            return opened.read(weight) if weight else load_model(opened)

        with pytest.raises(error, match=match) as raised:
            read()
        assert folder.name in str(raised.value)

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path / "absent", "does not exist")
        self.refused(tmp_path, r"expected a GGUF file.*config\.json.*jaxinfer\.json")

    def test_no_weights(self, tmp_path):
        write_json(tmp_path / "config.json", config_json("llama"))
        self.refused(tmp_path, r"neither model.safetensors nor model.safetensors.index.json")

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1', "\x00"])
    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    def test_json_that_is_none(self, text, file, tmp_path):
        write_directory(tmp_path, "llama")
        (tmp_path / file).write_text(text)
        self.refused(tmp_path, file)

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"temperature": "hot"}, "temperature must be between 0 and 1e+06; got 'hot'"),
            ({"temperature": -1}, "temperature must be between 0 and 1e+06; got -1"),
            ({"temperature": float("nan")}, "temperature must be between 0 and 1e+06; got nan"),
            ({"top_k": -3}, "top_k must be a whole number of at least -1; got -3"),
            ({"top_k": 1.5}, "top_k must be a whole number of at least -1; got 1.5"),
            ({"top_p": 0}, "top_p must be more than 0; got 0"),
            ({"top_p": [0.9]}, "top_p must be between 0 and 1; got [0.9]"),
            ({"min_p": 2}, "min_p must be between 0 and 1; got 2"),
            ({"repetition_penalty": 0}, "repetition_penalty must be between 1e-06 and 1e+06"),
            ({"do_sample": "no"}, "do_sample must be true or false; got 'no'"),
            ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them; got 'x'"),
            ({"eos_token_id": [3, None]}, "eos_token_id must be a token id or a list of them"),
            ({"eos_token_id": True}, "eos_token_id must be a token id or a list of them"),
            ({"eos_token_id": -1}, "eos_token_id must be a token id or a list of them; got -1"),
        ],
        ids=str,
    )
    def test_defaults_that_are_none(self, fields, match, tmp_path):
        """Found when the directory is opened, before weights are read."""
        write_directory(tmp_path, "llama")
        write_json(tmp_path / "generation_config.json", fields)
        with pytest.raises(CheckpointError, match=re.escape(f"generation_config.json: {match}")):
            open_checkpoint(tmp_path)

    def test_an_end_in_the_configuration_that_is_none(self, tmp_path):
        write_directory(tmp_path, "llama", eos_token_id="x")
        with pytest.raises(CheckpointError, match=r"[/\\]config\.json: eos_token_id must be a tok"):
            open_checkpoint(tmp_path)

    def test_a_shard_that_is_missing(self, tmp_path):
        write_directory(tmp_path, "llama", shards=3)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        self.refused(tmp_path, r"names files that are missing: .*00002-of-00003")

    @pytest.mark.parametrize("table", [None, {"weight_map": [1]}, {"weight_map": {"a": 1}}])
    def test_an_index_that_is_malformed(self, table, tmp_path):
        write_directory(tmp_path, "llama", shards=2)
        write_json(tmp_path / "model.safetensors.index.json", table or {})
        self.refused(tmp_path, "weight_map is missing or malformed")

    def test_a_tensor_that_is_missing(self, tmp_path):
        write_directory(tmp_path, "llama")
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        self.refused(tmp_path, r"model.layers.1.mlp.up_proj.weight is missing")

    def test_a_tensor_of_another_shape(self, tmp_path):
        write_directory(tmp_path, "llama", intermediate_size=81)
        self.refused(tmp_path, r"layers.0.gate_proj must have shape \(48, 81\); got \(48, 80\)")

    @pytest.mark.parametrize("keep", [0, 5, 8, 400, -4])
    def test_a_truncated_file(self, keep, tmp_path):
        write_directory(tmp_path, "llama")
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(tmp_path, "model.safetensors: truncated or corrupt")

    def test_a_file_that_is_something_else(self, tmp_path):
        write_directory(tmp_path, "llama")
        (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)
        self.refused(tmp_path, "truncated or corrupt safetensors")

    @pytest.mark.parametrize(
        ("entry", "match"),
        [
            ({"shape": [47, 48]}, r"tensor model.norm.weight of shape \(47, 48\) has 192 bytes"),
            ({"data_offsets": [0, 1 << 40]}, "model.norm.weight ends after the last byte"),
            ({"data_offsets": [-4, 4]}, "truncated or corrupt"),
            ({"data_offsets": [4]}, "truncated or corrupt"),
            ({"shape": None}, "truncated or corrupt"),
        ],
    )
    def test_a_header_that_contradicts_itself(self, entry, match, tmp_path):
        path = write_directory(tmp_path, "llama") / "model.safetensors"
        rewrite(path, lambda header: header["model.norm.weight"].update(entry))
        self.refused(tmp_path, match, "final_norm")

    def test_a_dtype_that_is_not_supported(self, tmp_path):
        path = write_directory(tmp_path, "llama") / "model.safetensors"
        rewrite(path, lambda header: header["model.norm.weight"].update(dtype="F8_E4M3"))
        self.refused(
            tmp_path, "F8_E4M3, which is not supported; supported: F32, F16, BF16", "final_norm",
            UnsupportedModelError,
        )  # fmt: skip

    def test_layers_that_would_be_left_out(self, tmp_path):
        write_directory(tmp_path, "llama", num_hidden_layers=1)
        self.refused(
            tmp_path,
            r"model\.safetensors holds 9 tensors that config\.json does not account for, the first "
            r"model\.layers\.1\.\S+; check config\.json: num_hidden_layers is 1, but the files "
            "hold tensors of 2 layers",
        )

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize(
        ("tensor", "check"),
        [
            ("model.layers.0.self_attn.q_proj.bias",
             r"attention_bias in config\.json, which says that there are no biases"),
            ("model.layers.9.foo", r"config\.json: num_hidden_layers is 2, .* of 3 layers"),
            ("model.layers.1.self_attn.q_norm.weight", "architectures in .* the family llama"),
            ("model.layers.1.mlp.experts.weight", "architectures in "),
            ("vision_tower.embeddings.weight", "architectures in "),
        ],
    )  # fmt: skip
    def test_a_tensor_that_would_be_left_out(self, tensor, check, shards, tmp_path):
        write_directory(tmp_path, "llama", shards=shards)
        file = tmp_path / "model.safetensors"
        if shards > 1:
            file = tmp_path / "model-00002-of-00003.safetensors"
        save_file(load_file(file) | {tensor: np.zeros(96, np.float32)}, file)
        self.refused(
            tmp_path, rf"{file.name} holds 1 tensor that config\.json does not account for, "
            rf"{tensor}; check {check}",
        )  # fmt: skip

    def test_a_tensor_of_the_index_that_would_be_left_out(self, tmp_path):
        """Before any of its files is opened."""
        write_directory(tmp_path, "llama", shards=3)
        index = tmp_path / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        table["weight_map"]["model.layers.9.foo"] = "model-00003-of-00003.safetensors"
        write_json(index, table)
        with pytest.raises(CheckpointError, match=r"00003-of-00003\.safetensors holds 1 tensor"):
            open_checkpoint(tmp_path)

    def test_no_embedding(self, tmp_path):
        write_directory(tmp_path, "llama")
        tensors = stored_tensors("llama")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        self.refused(tmp_path, r"tensor model\.embed_tokens\.weight is missing")

    def test_biases_that_would_be_left_out(self, tmp_path):
        write_directory(tmp_path, "llama")
        extra = {"model.layers.0.self_attn.o_proj.bias": np.zeros(48, np.float32)}
        save_file(stored_tensors("llama") | extra, tmp_path / "model.safetensors")
        self.refused(
            tmp_path, r"o_proj.bias; biases are supported on q_proj, k_proj and v_proj",
            error=UnsupportedModelError,
        )  # fmt: skip
