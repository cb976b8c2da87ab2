"""Text of a growing sequence: whole characters only, and the same text in the end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.models.test_tokenizer_gguf import cached

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20)


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_bytes_of_a_character_wait_for_the_last(text):
    words = byte_tokenizer()
    stream = words.stream()
    out = ""
    for token in words.encode(text):
        piece = stream.step(token)
        assert "\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in text
        out += piece
    # A text may end in U+FFFD itself, which is held back like half a character.
    assert out + stream.flush() == text


@pytest.mark.parametrize("kind", ["spm", "gpt-2"])
@settings(max_examples=100, deadline=None)
@given(prompt=TEXT, text=TEXT)
def test_pieces_are_the_text_after_the_prompt(kind, prompt, text):
    """A leading space belongs to the answer where there is something before it."""
    words = cached(kind)
    before, after = words.encode(prompt), words.encode(text, add_bos=False)
    stream = words.stream(before)
    out = "".join(map(stream.step, after)) + stream.flush()
    assert words.decode(before) + out == words.decode([*before, *after])


def test_half_a_character_at_the_end_is_replaced():
    words = byte_tokenizer()
    stream = words.stream()
    ids = words.encode("a€")
    assert [stream.step(i) for i in ids[:3]] == ["a", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_bytes_that_never_become_a_character():
    """They are given out once something whole follows."""
    words = byte_tokenizer()
    stream, lone = words.stream(), words.encode("é")[0]
    out = [stream.step(i) for i in (lone, lone, *words.encode("ab"))]
    assert "".join(out) == "\N{REPLACEMENT CHARACTER}" * 2 + "ab"
    assert out[:2] == ["", ""]


def test_special_tokens_are_left_out_on_request():
    words = cached("gpt-2")
    assert [words.stream().step(260), words.stream(skip_special=False).step(260)] == ["", "<|end|>"]


def test_numpy_ids():
    words = byte_tokenizer()
    assert words.decode(np.array(words.encode("héllo"), np.int32)) == "héllo"


def test_byte_tokenizer():
    words = byte_tokenizer(eos_id=None)
    assert (words.vocab_size, words.eos_ids, words.bos_id) == (256, (), None)
    ids = words.encode("".join(map(chr, range(1, 2000))))
    assert min(ids) >= 0
    assert max(ids) < 256


def test_half_of_a_surrogate_pair_is_refused():
    """Python makes such of bytes that are not UTF-8, on the command line and in standard input."""
    words = byte_tokenizer()
    with pytest.raises(ValueError, match=r"not valid Unicode: it holds U\+DCE9"):
        words.encode(b"caf\xe9".decode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="not valid Unicode"):
        words.apply_chat_template([{"role": "user", "content": "\ud83d"}])
