"""The tokenizer of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from jaxinfer.models.checkpoint.header_numbers import token_ids
from jaxinfer.models.errors import CheckpointError
from jaxinfer.models.tokenizer.tokenizer import Tokenizer


def tokenizer_from_directory(folder: Path) -> Tokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Raises:
        CheckpointError: `tokenizer.json` is missing, or a file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; convert the tokenizer to that format "
            "(transformers' AutoTokenizer writes it with save_pretrained)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        # Some files keep the settings of a training run, which would cut or fill every text.
        backend.no_truncation()
        backend.no_padding()
        config = _json(folder / "tokenizer_config.json")
        extra = _given(folder / "config.json") | _given(folder / "generation_config.json")
        template = _template(folder, config)
        names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token",
                                                            "unk_token")}  # fmt: skip
        special = {key: value for key, value in names.items() if value is not None}
        bos, eos_ids = _ends(backend, config, extra, special)
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{folder}: damaged tokenizer files ({error})") from error
    if backend.get_vocab_size(with_added_tokens=True) == 0:
        raise CheckpointError(f"{path} holds no tokens")
    add_bos = config.get("add_bos_token")
    if add_bos is None:  # the file's own post-processor knows
        probe = backend.encode("a").ids
        add_bos = bos is not None and probe[:1] == [bos]
    return Tokenizer(
        backend, bos_id=bos, add_bos=bool(add_bos), eos_ids=eos_ids, chat_template=template,
        special_tokens=special,
    )  # fmt: skip


def _ends(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    extra: dict[str, Any],
    special: dict[str, str],
) -> tuple[int | None, tuple[int, ...]]:
    """The token that begins a text, if there is one, and those that end it."""

    def index(key: str) -> int | None:
        return backend.token_to_id(special[key]) if key in special else None

    bos = config.get("bos_id", index("bos_token"))
    bos = extra.get("bos_token_id") if bos is None else bos
    begin = token_ids(bos, "bos_token_id")
    if len(begin) > 1:
        raise ValueError(f"bos_token_id must be one token id; got {bos!r:.80}")
    eos = config.get("eos_ids", extra.get("eos_token_id", index("eos_token")))
    return next(iter(begin), None), token_ids(eos, "eos_token_id")


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return values


def _given(path: Path) -> dict[str, Any]:
    """Fields that are not null: null means that another file decides."""
    return {key: value for key, value in _json(path).items() if value is not None}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
