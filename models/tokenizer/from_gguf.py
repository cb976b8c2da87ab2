"""The tokenizer inside a GGUF file."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4

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
    if kind == "gpt2":
        backend = _byte_level(tokens, get("merges") or [], get("pre", "default"), source)
    elif kind == "llama":
        backend = _sentencepiece(tokens, get("scores"), get("unknown_token_id"), source)
        if get("add_space_prefix", True):
            prefix = normalizers.Prepend("▁")
            backend.normalizer = normalizers.Sequence([prefix, backend.normalizer])
    else:
        raise UnsupportedModelError(
            f"{source}: tokenizer {kind!r} is not supported; supported: gpt2, llama"
        )
    types = get("token_type") or [1] * len(tokens)
    added = [
        tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)

    def name(key: str) -> tuple[str, str] | None:
        index = get(f"{key}_token_id")
        return None if index is None else (f"{key}_token", tokens[index])

    special = dict(filter(None, map(name, ("bos", "eos", "unknown", "padding"))))
    eos = get("eos_token_id")
    return Tokenizer(
        backend,
        bos_id=get("bos_token_id"),
        add_bos=bool(get("add_bos_token", kind == "llama")),
        eos_ids=() if eos is None else (int(eos),),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special,
    )


def _byte_level(
    tokens: list[str], merges: list[str], pre: str, source: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2 and after)."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
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
    tokens: list[str], scores: list[float] | None, unknown: int | None, source: str
) -> tokenizers.Tokenizer:
    """SentencePiece BPE, its merges recovered from the scores.

    SentencePiece merges the adjacent pair whose union has the best score. As a list of merges:
    every split of every token into two tokens, ordered by the score of the whole.
    """
    if scores is None:
        raise CheckpointError(f"{source}: the tokenizer has no scores")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for index, token in enumerate(tokens):
        splits = [
            (vocabulary[token[:i]], vocabulary[token[i:]], index)
            for i in range(1, len(token))
            if token[:i] in vocabulary and token[i:] in vocabulary
        ]
        merges.extend(sorted(splits))
    merges.sort(key=lambda merge: -scores[merge[2]])
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(tokens[left], tokens[right]) for left, right, _ in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend
