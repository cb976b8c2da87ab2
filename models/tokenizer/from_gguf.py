"""The tokenizer inside a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# How text is cut before byte-level BPE, by the name in the file. The regular expressions are those
# of the models' own tokenizers.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|", 1)
_PATTERNS = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3, "gpt-2": _WORDS, "default": _WORDS}
PRE_TOKENIZERS = ("smollm", *_PATTERNS)
# Chat templates know these by Hugging Face's names.
_TEMPLATE_NAMES = {"unknown": "unk", "padding": "pad"}


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that a file's metadata describe.

    Args:
        metadata: Fields of the file by name.
        source: Its path, for messages.

    Raises:
        CheckpointError: the file has no tokenizer.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = get("model"), get("tokens")
    if kind is None or not tokens:
        raise CheckpointError(f"{source}: the file holds no tokenizer")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{source}: the tokenizer holds a token twice")
    types = get("token_type")
    types = np.ones(len(tokens), np.int32) if types is None else np.asarray(types)
    if len(types) != len(tokens):
        raise CheckpointError(f"{source}: {len(tokens)} tokens have {len(types)} types")

    def name(key: str) -> tuple[str, str] | None:
        index = get(f"{key}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(tokens):
            raise CheckpointError(f"{source}: {key}_token_id is {index} of {len(tokens)} tokens")
        return f"{_TEMPLATE_NAMES.get(key, key)}_token", tokens[index]

    special = dict(filter(None, map(name, ("bos", "eos", "unknown", "padding"))))
    if kind == "gpt2":
        merges = get("merges")
        if merges is None:  # letter by letter, which no model has seen
            raise CheckpointError(
                f"{source}: metadata 'tokenizer.ggml.merges' is missing, which a tokenizer of the "
                "kind gpt2 needs"
            )
        backend = _byte_level(tokens, list(merges), get("pre", "default"), source)
    elif kind == "llama":
        scores = get("scores")
        if scores is None or len(scores) != len(tokens):
            raise CheckpointError(f"{source}: the tokenizer has no score for every token")
        backend = _sentencepiece(
            tokens, np.asarray(scores), types, get("unknown_token_id"),
            prefix=bool(get("add_space_prefix", True)),
        )  # fmt: skip
    else:
        raise UnsupportedModelError(
            f"{source}: tokenizer {kind!r} is not supported; supported: gpt2, llama"
        )
    added = np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED)))
    backend.add_tokens(
        [
            tokenizers.AddedToken(
                tokens[i], special=bool(types[i] != USER_DEFINED), normalized=False
            )
            for i in added
        ]
    )
    return Tokenizer(
        backend,
        bos_id=get("bos_token_id"),
        add_bos=bool(get("add_bos_token", kind == "llama")),
        eos_ids=eos_ids_from_gguf(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special,
    )


def eos_ids_from_gguf(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: the end of a text, and of a turn or message where given."""
    keys = (f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom"))
    found = (metadata[key] for key in keys if metadata.get(key) is not None)
    return tuple(dict.fromkeys(int(index) for index in found))


def _byte_level(
    tokens: list[str], merges: list[str], pre: str, source: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2 and after)."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [merge.split(" ", 1) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{source}: a merge of the tokenizer is not a pair")
    try:
        model = models.BPE(vocab=vocabulary, merges=[(a, b) for a, b in pairs])
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{source}: damaged tokenizer ({error})") from error
    backend = tokenizers.Tokenizer(model)
    if pre == "smollm":
        cuts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif pre in _PATTERNS:
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        raise UnsupportedModelError(
            f"{source}: pre-tokenizer {pre!r} is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: list[str], scores: np.ndarray, types: np.ndarray, unknown: int | None, *, prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE, its merges recovered from the scores.

    SentencePiece merges the adjacent pair whose union has the best score. As a list of merges:
    every split of every token into two tokens, ordered by the score of the whole. Control and byte
    tokens are never the result of a merge: the text `<0x41>` is not the byte 0x41.

    Args:
        tokens: By id.
        scores: `[V]`.
        types: `[V]`.
        unknown: Id for what cannot be written.
        prefix: A text begins with a space that is not part of it.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    find = vocabulary.get
    merges: list[tuple[str, str]] = []
    # Stable: of tokens with equal scores the first one wins, as in SentencePiece.
    order = np.argsort(-scores, kind="stable")
    for index in order[types[order] == NORMAL].tolist():
        token = tokens[index]
        splits = [
            (left, right, token[:i], token[i:])
            for i in range(1, len(token))
            if (left := find(token[:i])) is not None and (right := find(token[i:])) is not None
        ]
        if len(splits) > 1:
            splits.sort()
        merges.extend([split[2:] for split in splits])
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        pieces.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(pieces)
    return backend
