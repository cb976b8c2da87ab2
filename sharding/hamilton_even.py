"""Hamiltonian cycles of the complete directed graph for even n from 8 up.

Take the n - 2 directed zigzag cycles on n - 1 vertices (Walecki's construction: the residues
modulo w = n - 2 and one more, `hub`). Break one arc of each and put the last vertex, `extra`, into
the gap. If the broken arcs form a Hamiltonian path of the n - 1 vertices, that path closed
through `extra` is the missing cycle, and all arcs are used once. Which arcs to break:

* n = 0 mod 4: Tillson's choice (J. Combin. Theory B 29, 1980) as the TASP code states it: the
  same place in all rows but four.
* n = 2 mod 4: arcs of difference 5 in all rows but five to seven; `_LINKS` names the arcs of the
  other rows for each residue of n - 2 modulo 20. Found for this library by computer search for
  families that are affine in n; n = 10 has a choice of its own.
"""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.zigzag import zigzag

# Arcs of the exceptional rows as (tail, head): (q, c) is vertex q·w/4 + c modulo w.
Vertex = tuple[int, int] | None
HUB: Vertex = None
Links = tuple[tuple[Vertex, Vertex], ...]
_FIVE: Links = (
    ((0, -2), (0, 6)), ((2, 0), HUB), (HUB, (0, 3)), ((0, -1), (0, 4)), ((0, 0), (0, 5)),
)  # fmt: skip
_LINKS: dict[int, Links] = {
    0: (
        ((0, -5), (0, 6)), ((0, 1), (0, 4)), ((0, -1), (0, 5)), ((2, 0), (2, 2)),
        ((2, -3), HUB), (HUB, (0, 3)), ((0, -2), (0, 0)),
    ),
    4: _FIVE,
    8: (
        ((1, -2), (3, 6)), ((3, -2), (1, 3)), ((2, -2), (0, 3)), ((0, 0), HUB),
        (HUB, (3, 3)), ((0, -2), (2, 3)),
    ),
    12: _FIVE,
    16: (
        ((2, -4), (2, 4)), ((3, -2), (1, 4)), ((2, -1), (0, 3)), ((1, -1), (3, 3)),
        ((0, -1), (2, 1)), ((0, -2), HUB),
    ),
}  # fmt: skip
# n = 10 is too small for its family: difference 1 in all rows but four.
_LINKS_10: Links = (((0, 1), HUB), (HUB, (0, 2)), ((0, 2), (0, 6)), ((0, 0), (0, 3)))


def even_cycles(num_ranks: int) -> npt.NDArray[np.int32]:
    """Split the complete directed graph on an even number of ranks, 8 or more.

    Args:
        num_ranks: n.

    Returns:
        [n - 1, n] ranks in visiting order; rank n - 1 is `extra`, rank n - 2 is `hub`.
    """
    n, w = num_ranks, num_ranks - 2
    assert n >= 8, n
    assert n % 2 == 0, n
    residues = (zigzag(w)[None, :] + np.arange(w)[:, None]) % w
    rows = np.concatenate([np.full((w, 1), w), residues], axis=1)
    starts = starts_0_mod_4(w) if n % 4 == 0 else starts_2_mod_4(w)
    turned = np.take_along_axis(rows, (starts[:, None] + np.arange(n - 1)) % (n - 1), axis=1)
    path = last_path(turned)
    cycles = np.concatenate([turned, path[None, :]])
    return np.concatenate([np.full((n - 1, 1), n - 1), cycles], axis=1).astype(np.int32)


def last_path(turned: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Follow the arcs from the last to the first vertex of each row, [w, n - 1] -> [n - 1]."""
    w = turned.shape[0]
    following = np.full(w + 1, -1, np.int64)
    following[turned[:, -1]] = turned[:, 0]
    (start,) = set(range(w + 1)) - set(turned[:, 0].tolist())
    path = [start]
    while following[path[-1]] >= 0:
        path.append(int(following[path[-1]]))
    assert len(path) == w + 1, f"{w + 2} ranks: broken arcs give a path of {len(path)} vertices"
    return np.array(path)


def starts_0_mod_4(w: int) -> npt.NDArray[np.int64]:
    """[w] place in each row, counted from `hub`, of the head of its broken arc; w = 2 mod 4."""
    k = (w - 2) // 4
    starts = np.full(w, 2 * k)
    starts[0] = 1
    starts[k + 1] = (4 * k + 2) % (w + 1)
    starts[2 * k + 2] = 3
    starts[3 * k + 2] = 4 * k
    return starts


def starts_2_mod_4(w: int) -> npt.NDArray[np.int64]:
    """As `starts_0_mod_4` for w = 0 mod 4."""
    sequence = zigzag(w)
    # The arc of odd difference d leaves zigzag place d - 1, that is place d counted from `hub`.
    difference, links = (1, _LINKS_10) if w == 8 else (5, _LINKS[w % 20])
    starts = np.full(w, difference + 1)
    for tail, head in links:
        row, place = _locate(_vertex(tail, w), _vertex(head, w), sequence)
        starts[row] = place
    return starts


def _vertex(name: Vertex, w: int) -> int:
    return w if name is None else (name[0] * (w // 4) + name[1]) % w


def _locate(tail: int, head: int, sequence: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Row that contains an arc, and the place of the arc's head in it counted from `hub`."""
    w = len(sequence)
    if tail == w:
        return (head - int(sequence[0])) % w, 1
    if head == w:
        return (tail - int(sequence[-1])) % w, 0
    difference = (head - tail) % w
    # Steps of the zigzag are 1, -2, 3, -4, …
    place = difference - 1 if difference % 2 else w - difference - 1
    return (tail - int(sequence[place])) % w, place + 2
