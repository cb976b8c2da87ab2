"""Tokenizers in GGUF files: byte-level BPE, SentencePiece BPE, and refusals."""

import functools
import itertools
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jaxinfer.models.checkpoint.open import open_checkpoint
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.from_gguf import PRE_TOKENIZERS, tokenizer_from_gguf
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from tests.models.gguf_files import write_model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def bpe_fields(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """256 bytes, some merges, an end token and one that users see."""
    merges = ["h e", "l l", "he ll", "Ġ w"]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["he", "ll", "hell", "Ġw", "<|end|>", "<think>"]
    types = [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
              "token_type": types, "eos_token_id": 260}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()
            if value is not None}  # fmt: skip


SPM = [
    ("<unk>", UNKNOWN, 0), ("<s>", CONTROL, 0), ("</s>", CONTROL, 0),
    *((f"<0x{byte:02X}>", BYTE, 0) for byte in range(256)),
    ("▁the", NORMAL, -1), ("▁t", NORMAL, -2), ("he", NORMAL, -3), ("▁th", NORMAL, -4),
    ("hel", NORMAL, -5), ("lo", NORMAL, -6), ("hello", NORMAL, -7), ("▁hello", NORMAL, -8),
    # Pairs that overlap: the better score decides.
    ("el", NORMAL, -2.5), ("le", NORMAL, -3.5), ("ol", NORMAL, -4.5), ("ll", NORMAL, -5.5),
    *((char, NORMAL, -20 - i) for i, char in enumerate("▁thelo wrd")if char != " "),
]  # fmt: skip


def spm_fields(**changes: Any) -> dict[str, Any]:
    tokens, types, scores = zip(*SPM, strict=True)
    fields = {"model": "llama", "tokens": list(tokens), "token_type": np.array(types),
              "scores": np.array(scores, np.float32), "bos_token_id": 1, "eos_token_id": 2,
              "unknown_token_id": 0}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()
            if value is not None}  # fmt: skip


def make(fields: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(fields, "model.gguf")


def pieces(words: Tokenizer, text: str, fields: dict[str, Any]) -> list[str]:
    return [fields["tokenizer.ggml.tokens"][i] for i in words.encode(text, add_bos=False)]


@functools.cache
def cached(kind: str) -> Tokenizer:
    return make(spm_fields() if kind == "spm" else bpe_fields(kind))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@pytest.mark.parametrize("kind", [*PRE_TOKENIZERS, "spm"])
def test_any_text_there_and_back(kind, text):
    words = cached(kind)
    ids = words.encode(text, add_bos=False)
    # Qwen normalises first; U+2581 stands for a space in SentencePiece.
    if kind == "qwen2":
        text = unicodedata.normalize("NFC", text)
    elif kind == "spm":
        text = text.replace("▁", " ")
    assert words.decode(ids, skip_special=False) == text


def test_merges_of_bytes():
    fields = bpe_fields()
    words = make(fields)
    assert pieces(words, "hello world", fields) == ["hell", "o", "Ġw", "o", "r", "l", "d"]
    assert words.encode("hell<|end|>") == [258, 260]
    assert words.decode([258, 260, 261]) == "hell<think>"
    assert words.decode([258, 260, 261], skip_special=False) == "hell<|end|><think>"
    assert (words.eos_ids, words.bos_id, words.add_bos) == ((260,), None, False)


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("gpt-2", "it's 1234  x", ["it", "'s", " 1234", " ", " x"]),
        ("smollm", "it's 1234  x", ["it", "'s", " ", "1", "2", "3", "4", " ", " x"]),
        ("llama-bpe", "IT'S 1234\n\n x!", ["IT", "'S", " ", "123", "4", "\n\n", " x", "!"]),
        ("qwen2", "IT'S 1234\n\n x!", ["IT", "'S", " ", "1", "2", "3", "4", "\n\n", " x", "!"]),
    ],
)
def test_where_text_is_cut(pre, text, cuts):
    """A merge never crosses a cut: with every pair of bytes merged, cuts are token borders."""
    letters = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
               .pre_tokenize_str(cut)[0][0] for cut in cuts]  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Merges that build every cut, and any two neighbours, letter by letter.
    tokens, merges = dict.fromkeys(alphabet), {}
    for first, second in zip(letters, [*letters[1:], ""], strict=True):
        for whole in (first, first + second):
            for end in range(2, len(whole) + 1):
                merges.setdefault((whole[: end - 1], whole[end - 1]))
                tokens.setdefault(whole[:end])
    fields = bpe_fields(
        pre, tokens=list(tokens), merges=[" ".join(pair) for pair in merges], token_type=None,
        eos_token_id=None,
    )  # fmt: skip
    assert pieces(make(fields), text, fields) == letters


def test_merges_by_score():
    fields = spm_fields()
    words = make(fields)
    assert pieces(words, "the hello", fields) == ["▁the", "▁hello"]
    assert pieces(words, "hello the", fields) == ["▁hello", "▁the"]
    assert (words.bos_id, words.add_bos, words.eos_ids) == (1, True, (2,))
    assert words.encode("the") == [1, 259]


def greedy_spm(text: str) -> list[str]:
    """SentencePiece's algorithm as its paper has it: merge the best-scored pair until none is."""
    scores = {token: score for token, kind, score in SPM if kind == NORMAL}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in scores
        ]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("thelo wrd"), min_size=1, max_size=24))
def test_merges_as_sentencepiece_has_them(text):
    assert pieces(cached("spm"), text, spm_fields()) == greedy_spm(text)


def test_bytes_stand_for_what_has_no_token():
    fields = spm_fields()
    words = make(fields)
    assert pieces(words, "é", fields) == ["▁", "<0xC3>", "<0xA9>"]
    # The name of a byte is text like any other.
    assert words.encode("<0x41>", add_bos=False) != [3 + 0x41]
    assert words.decode(words.encode("<0x41>")) == "<0x41>"


def test_without_a_leading_space():
    """Gemma's way."""
    fields = spm_fields(add_space_prefix=False)
    words = make(fields)
    assert pieces(words, "hello", fields) == ["hello"]
    assert words.decode(words.encode(" hello")) == " hello"


@pytest.mark.parametrize("given", [True, False, None])
def test_the_token_that_begins_a_text(given):
    words = make(spm_fields(add_bos_token=given))
    assert (words.encode("the")[0] == 1) == (given is not False)
    words = make(bpe_fields(bos_token_id=260, add_bos_token=given))
    assert (words.encode("the")[0] == 260) == (given is True)


def test_names_for_the_template():
    template = "{{ bos_token }}{{ eos_token }}{{ unk_token }}"
    words = make(spm_fields() | {"tokenizer.chat_template": template})
    assert words.apply_chat_template([{"role": "user", "content": ""}]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "holds no tokenizer"),
        (bpe_fields(tokens=None), "holds no tokenizer"),
        (bpe_fields(tokens=["a", "b", "a"]), "holds a token twice"),
        (bpe_fields(token_type=[1, 1]), "262 tokens have 2 types"),
        (bpe_fields(merges=["he"]), "a merge of the tokenizer is not a pair"),
        (bpe_fields(merges=None), "metadata 'tokenizer.ggml.merges' is missing"),
        (bpe_fields(merges=["he nowhere"]), "damaged tokenizer"),
        (bpe_fields(eos_token_id=262), "eos_token_id is 262 of 262 tokens"),
        (spm_fields(scores=None), "no score for every token"),
        (spm_fields(scores=np.zeros(3, np.float32)), "no score for every token"),
        (spm_fields(bos_token_id=9999), "bos_token_id is 9999 of"),
        (spm_fields(unknown_token_id=9999), "unknown_token_id is 9999 of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged(fields, match):
    with pytest.raises(CheckpointError, match=f"model.gguf: .*{match}") as raised:
        make(fields)
    assert not isinstance(raised.value, UnsupportedModelError)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (bpe_fields(model="bert"), "tokenizer 'bert' is not supported; supported: gpt2, llama"),
        (bpe_fields("tekken"), "pre-tokenizer 'tekken' is not .*: smollm, qwen2, llama-bpe"),
    ],
)
def test_unsupported(fields, match):
    with pytest.raises(UnsupportedModelError, match=match):
        make(fields)


def test_it_does_not_match_the_model(tmp_path):
    path = write_model(tmp_path / "model.gguf", "llama", tokenizer=bpe_fields())
    with pytest.raises(CheckpointError, match=r"tokenizer has 262 tokens, the model only 97"):
        open_checkpoint(path).tokenizer()
