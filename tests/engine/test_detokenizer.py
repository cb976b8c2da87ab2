"""Text of an answer as it grows: whole characters, and no part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.detokenizer import Detokenizer
from jaxinfer.engine.request import Prompt, Request
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from jaxinfer.outputs import RequestMetrics
from jaxinfer.sampling_params import SamplingParams

WORDS = byte_tokenizer()


def feed(made: Detokenizer, text: str) -> tuple[list[str], bool]:
    """Give the bytes of a text one by one; pieces given out, and whether a stop string came."""
    pieces = []
    for token in WORDS.encode(text):
        stopped = made.step(token)
        if stopped:
            made.finish()
        pieces.append(made.delta(finished=stopped))
        if stopped:
            return pieces, True
    return pieces, False


def request(made: Detokenizer, *, min_tokens: int, max_tokens: int = 100) -> Request:
    """An answer of which one token is one byte."""
    params = SamplingParams(min_tokens=min_tokens, max_tokens=max_tokens)
    prompt = Prompt(
        request_id="", text=None, token_ids=[1], params=params, metrics=RequestMetrics(arrival_s=0)
    )
    return Request(
        prompt=prompt, index=0, arrival=0, key=(0, 0), stop_ids=(), max_tokens=max_tokens,
        detokenizer=made,
    )  # fmt: skip


def answer(made: Detokenizer, text: str, *, min_tokens: int, max_tokens: int = 100) -> Request:
    """The answer after the bytes of a text, or as many as it took before it ended."""
    growing = request(made, min_tokens=min_tokens, max_tokens=max_tokens)
    for token in WORDS.encode(text):
        if growing.finished:
            break
        growing.append(token, None)
    return growing


def end(made: Detokenizer) -> str:
    made.finish()
    return made.delta(finished=True)


def test_characters_of_several_bytes_come_whole():
    made = Detokenizer(WORDS)
    pieces, stopped = feed(made, "aé€🎉")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🎉"]
    assert not stopped
    assert end(made) == ""


def test_half_a_character_at_the_end():
    made = Detokenizer(WORDS)
    for token in WORDS.encode("a🎉")[:3]:
        made.step(token)
    assert made.delta(finished=False) == "a"
    assert end(made) == "\N{REPLACEMENT CHARACTER}"
    assert made.text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "want", "reason"),
    [
        ("hello STOP more", ["STOP"], "hello ", "STOP"),
        ("hello STO more", ["STOP"], "hello STO more", None),
        ("aab", ["ab"], "a", "ab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("x€y", ["€"], "x", "€"),
        ("abcd", ["cd", "bc"], "a", "bc"),  # the one that ends first
        ("x", ["x"], "", "x"),
    ],
)
def test_stop_strings_over_token_borders(text, stop, want, reason):
    for keep in (False, True):
        made = Detokenizer(WORDS, stop=stop, keep_stop=keep)
        pieces, stopped = feed(made, text)
        assert stopped == (reason is not None)
        assert made.stop_reason == reason
        whole = want + (reason or "" if keep else "")
        assert "".join(pieces) + end(made) == whole == made.text


def test_what_may_become_a_stop_string_is_held_back():
    made = Detokenizer(WORDS, stop=["<end>"])
    assert feed(made, "a<en")[0] == ["a", "", "", ""]
    assert feed(made, "x<")[0] == ["<enx", ""]
    assert end(made) == "<"


def test_a_stop_string_within_one_token():
    """Merges make tokens of many characters: the answer is cut inside of one."""
    from tests.models.test_tokenizer_gguf import cached

    words = cached("gpt-2")
    [token] = words.encode("hell")
    made = Detokenizer(words, stop=["e"])
    assert made.step(token)
    assert made.delta(finished=True) == "h"
    kept = Detokenizer(words, stop=["e"], keep_stop=True)
    assert kept.step(token)
    assert kept.delta(finished=True) == "he"


def test_the_prompt_holds_no_stop_string():
    """What begins before the answer does not end it."""
    made = Detokenizer(WORDS, prefix=WORDS.encode("ST"), stop=["STOP"])
    pieces, stopped = feed(made, "OP")
    assert not stopped
    assert "".join(pieces) + end(made) == "OP"


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "want", "reason"),
    [
        ("a.b.c", ["."], 0, "a", "."),
        ("a.b.c", ["."], 1, "a", "."),  # one token is there, and the string is in the second
        ("a.b.c", ["."], 2, "a.b", "."),
        ("a.b.c", ["."], 4, "a.b.c", None),
        ("abcabc", ["abc"], 2, "", "abc"),  # begins among the first tokens, ends after them
        ("abcabc", ["abc"], 3, "abc", "abc"),
        ("abcabc", ["abc"], 6, "abcabc", None),
        # Looking back for the long one must not find the short one in the first tokens.
        ("x.yz", [".", "longer"], 3, "x.yz", None),
        ("x.yz.", [".", "longer"], 3, "x.yz", "."),
        ("a€b", ["€"], 3, "a", "€"),  # its last byte is the fourth token
        ("a€b", ["€"], 4, "a€b", None),
    ],
)
def test_stop_strings_wait_for_min_tokens(text, stop, min_tokens, want, reason):
    for keep in (False, True):
        made = Detokenizer(WORDS, stop=stop, keep_stop=keep)
        growing = answer(made, text, min_tokens=min_tokens)
        assert growing.finish_reason == ("stop" if reason else None)
        assert growing.stop_reason == reason
        assert made.text == want + (reason or "" if keep else "")


def test_what_came_too_early_for_a_stop_string_is_given_out():
    made = Detokenizer(WORDS, stop=["ab", "abcd"])
    growing = request(made, min_tokens=3)
    pieces = []
    for token in WORDS.encode("xabab"):
        growing.append(token, None)
        pieces.append(made.delta(finished=growing.finished))
    # "ab" may still become "abcd", and no longer once another "a" follows.
    assert pieces == ["x", "", "", "ab", ""]
    assert growing.stop_reason == "ab"
    other = Detokenizer(WORDS, stop=["ab", "xyz"])
    for token in WORDS.encode("ab"):
        other.step(token, may_stop=False)
    assert other.delta(finished=False) == "ab"


def test_the_rest_of_a_short_answer_holds_no_stop_string():
    """Half a character becomes text when the answer ends, and min_tokens holds for it, too."""
    stop = "\N{REPLACEMENT CHARACTER}"
    for min_tokens, want in ((3, "a" + stop), (2, "a")):
        made = Detokenizer(WORDS, stop=[stop])
        growing = request(made, min_tokens=min_tokens, max_tokens=3)
        for token in WORDS.encode("a🎉")[:3]:
            growing.append(token, None)
        assert growing.finish_reason == "length"
        assert made.text == want


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc€", max_size=30),
    stop=st.lists(st.text("abc€", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
def test_as_if_the_whole_text_were_there(text, stop, keep):
    """Pieces add up to the text before the stop string that is complete first."""
    made = Detokenizer(WORDS, stop=stop, keep_stop=keep)
    pieces, stopped = feed(made, text)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    assert stopped == bool(ends)
    if not ends:
        want = text
    else:
        first = min(ends)[0]
        # Of those that end with the same character, the longest begins first.
        place = min(begin for last, begin, _ in ends if last == first)
        want = text[:first] if keep else text[:place]
    assert "".join(pieces) + end(made) == want
    given_out = ""
    for piece in pieces[:-1] if stopped else pieces:
        given_out += piece
        assert want.startswith(given_out)
