"""Every benchmark by the name of its op."""

import difflib
import importlib
from collections.abc import Iterable, Sequence

from bench.case import Case

# Name of the op in rows, and the module under bench/cases with its `cases()`.
OPS = (
    "attention",
    "decode_attention",
    "rope_kv_write",
    "project_rope_write",
    "add_rms_norm",
    "flat_matmul",
    "ring_attention",
    "e2e_prefill",
    "e2e_decode",
)


def cases_of(op: str, *, devices: int | None = None) -> list[Case]:
    """The cases of an op.

    Args:
        op: Its name.
        devices: On how many, for ops over several; None: all.

    Raises:
        ValueError: there is no such op, or it is one of a single device.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; {_hint(op, OPS)}")
    cases = importlib.import_module(f"bench.cases.{op}").cases
    if devices is None:
        return cases()
    if op != "ring_attention":
        raise ValueError(f"{op} runs on one device; devices are for ring_attention")
    return cases(devices)


def select(cases: Iterable[Case], *, tag: str, words: Sequence[str]) -> list[Case]:
    """The cases with a tag whose names hold all of `words`; `tag="all"` takes every tag."""
    return [
        case
        for case in cases
        if tag in ("all", case.tag) and all(word in case.name.split() for word in words)
    ]


def pick(case: Case, wanted: Sequence[str]) -> list[str]:
    """The implementations of a case that were asked for; all if none was named.

    Raises:
        ValueError: a name that the case does not have.
    """
    for name in wanted:
        if name not in case.implementations:
            raise ValueError(
                f"case {case.name!r} has no implementation {name!r}; "
                f"{_hint(name, case.implementations)}"
            )
    return list(wanted or case.implementations)


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return hint + f"known: {', '.join(known)}"


def near_words(words: Sequence[str], cases: Iterable[Case]) -> str:
    """For a message: words of cases' names that those which are in none of them may have meant."""
    known = {word for case in cases for word in case.name.split()}
    unknown = [word for word in words if word not in known]
    # A part of a word counts as near whatever is behind it.
    near = [
        next(iter(sorted(k for k in known if k.startswith(word))), None)
        or next(iter(difflib.get_close_matches(word, sorted(known), n=1)), None)
        for word in unknown
    ]
    found = [repr(word) for word in near if word is not None]
    return f"; did you mean {' '.join(found)}?" if found else ""
