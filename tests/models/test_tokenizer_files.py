"""The tokenizer of a Hugging Face directory, and of a converted one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxinfer.models.checkpoint.huggingface import checked_tokenizer
from jaxinfer.models.errors import CheckpointError
from jaxinfer.models.tokenizer.from_files import tokenizer_from_directory
from tests.models.huggingface_files import write_json

SPECIAL = ("<s>", "</s>", "<|im_end|>")
TEXTS = ["hello world", " two  spaces", "héllo 🎉 日本", "", "line\n\nline", "</s", "a</s>b"]


def backend(*, post_processor: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE with one merge and three special tokens: ids 0 … 256, then these."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"he": 256}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    if post_processor:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 257)]
        )
    return made


def write(folder: Path, made: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    (made or backend()).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(text, tmp_path):
    words = tokenizer_from_directory(write(tmp_path))
    assert words.decode(words.encode(text), skip_special=False) == text
    # As after a conversion.
    (tmp_path / "saved").mkdir()
    words.save(tmp_path / "saved")
    assert tokenizer_from_directory(tmp_path / "saved").encode(text) == words.encode(text)


def test_special_tokens(tmp_path):
    words = tokenizer_from_directory(write(tmp_path, bos_token="<s>", eos_token="</s>"))
    assert words.vocab_size == 260
    assert words.encode("he</s>") == [256, 258]
    assert words.decode([256, 258, 256]) == "hehe"
    assert words.decode([256, 258, 256], skip_special=False) == "he</s>he"
    assert words.token(258) == "</s>"
    assert words.encode("</s") != words.encode("</s>")


@pytest.mark.parametrize(
    ("config", "post_processor", "first"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, False, 257),
        ({"bos_token": {"content": "<s>", "lstrip": False}, "add_bos_token": True}, False, 257),
        ({"bos_token": "<s>", "add_bos_token": False}, True, 256),
        ({"bos_token": "<s>"}, True, 257),  # the post-processor decides
        ({"bos_token": "<s>"}, False, 256),
        ({"bos_token": None, "add_bos_token": True}, False, 256),
        ({}, False, 256),
    ],
)
def test_the_token_that_begins_a_text(config, post_processor, first, tmp_path):
    words = tokenizer_from_directory(
        write(tmp_path, backend(post_processor=post_processor), **config)
    )
    assert words.encode("he")[0] == first
    assert words.encode("he", add_bos=False) == [256]
    if config.get("bos_token"):
        assert words.encode("he", add_bos=True) == [257, 256]
        assert words.encode("<s>he", add_bos=True) == [257, 256]  # never twice


def test_begin_from_the_models_config(tmp_path):
    """Where `tokenizer_config.json` is absent."""
    write(tmp_path, backend(post_processor=True))
    (tmp_path / "tokenizer_config.json").unlink()
    write_json(tmp_path / "config.json", {"bos_token_id": 257})
    assert tokenizer_from_directory(tmp_path).encode("he") == [257, 256]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, (258,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 259}}, (259,)),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [259, 258]}},
         (259, 258)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": None}}, (258,)),
        ({"config": {"eos_token_id": 9}, "generation_config": {"eos_token_id": None}}, (9,)),
        ({}, ()),
    ],
)  # fmt: skip
def test_tokens_that_end_a_text(files, ids, tmp_path):
    write(tmp_path)
    for name, values in files.items():
        write_json(tmp_path / f"{name}.json", values)
    assert tokenizer_from_directory(tmp_path).eos_ids == ids


def test_settings_of_training_are_off(tmp_path):
    """A file that cuts and fills texts does neither here."""
    made = backend()
    made.enable_truncation(3)
    made.enable_padding(length=8, pad_id=257)
    words = tokenizer_from_directory(write(tmp_path, made))
    assert len(words.encode("x" * 20)) == 20
    assert len(words.encode("x")) == 1


class TestTemplate:
    """Where chat templates are found."""

    def test_in_the_configuration(self, tmp_path):
        words = tokenizer_from_directory(write(tmp_path, chat_template="T"))
        assert words.chat_template == "T"

    def test_in_a_file_of_its_own(self, tmp_path):
        write(tmp_path, chat_template="T")
        (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
        assert tokenizer_from_directory(tmp_path).chat_template == "{{ eos_token }}"

    def test_several_by_name(self, tmp_path):
        named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
        assert tokenizer_from_directory(write(tmp_path, chat_template=named)).chat_template == "B"

    def test_none(self, tmp_path):
        words = tokenizer_from_directory(write(tmp_path))
        assert words.chat_template is None
        with pytest.raises(ValueError, match=r"no chat template \(a base model\?\)"):
            words.apply_chat_template([{"role": "user", "content": "he"}])

    def test_special_tokens_by_name(self, tmp_path):
        template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
        words = tokenizer_from_directory(
            write(tmp_path, bos_token="<s>", eos_token="</s>", chat_template=template)
        )
        assert words.apply_chat_template([{"role": "user", "content": "he"}]) == [257, 256, 258]


def test_files_are_utf8_whatever_the_locale(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "é"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("é", encoding="utf-8")
    program = (
        "import sys; from pathlib import Path\n"
        "from jaxinfer.models.checkpoint.huggingface import read_json\n"
        "from jaxinfer.models.tokenizer.from_files import tokenizer_from_directory\n"
        "folder = Path(sys.argv[1])\n"
        "template = tokenizer_from_directory(folder).chat_template\n"
        "token = read_json(folder / 'tokenizer_config.json')['bos_token']\n"
        "print(ascii(template), ascii(token))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | plain, check=False,
    )  # fmt: skip
    assert done.stdout == "'\\xe9' '\\xe9'\n", done.stderr


class TestDamage:
    """What is wrong is said with the folder it is in."""

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Magic"}}'])
    def test_tokenizer(self, text, tmp_path):
        (write(tmp_path) / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged tokenizer files") as raised:
            tokenizer_from_directory(tmp_path)
        assert tmp_path.name in str(raised.value)

    @pytest.mark.parametrize(
        "file", ["tokenizer_config.json", "config.json", "generation_config.json"]
    )
    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_other_files(self, file, text, tmp_path):
        (write(tmp_path) / file).write_text(text)
        with pytest.raises(CheckpointError, match="damaged tokenizer files"):
            tokenizer_from_directory(tmp_path)

    @pytest.mark.parametrize("template", [[{"name": "default"}], [1], ["x"]])
    def test_template(self, template, tmp_path):
        with pytest.raises(CheckpointError, match="damaged tokenizer files"):
            tokenizer_from_directory(write(tmp_path, chat_template=template))

    @pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id"])
    def test_tokens_that_are_none(self, field, tmp_path):
        write_json(write(tmp_path) / "config.json", {field: "x"})
        with pytest.raises(CheckpointError, match=f"{field} must be a token id or a list of them"):
            tokenizer_from_directory(tmp_path)

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; convert"):
            tokenizer_from_directory(tmp_path)

    def test_it_does_not_match_the_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="has 260 tokens, the model only 259"):
            checked_tokenizer(write(tmp_path), 259)
        # Models have more rows than tokens: padded to a multiple.
        assert checked_tokenizer(tmp_path, 320).vocab_size == 260

    def test_no_tokens_at_all(self, tmp_path):
        empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(empty))
        with pytest.raises(CheckpointError, match="holds no tokens"):
            tokenizer_from_directory(tmp_path)
