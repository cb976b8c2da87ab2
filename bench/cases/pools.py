"""Pools of pages among an op's arrays: each call overwrites them and returns them last."""

from bench.case import Arrays

POOLS = (5, 6)  # keys and values, among the arguments of a call that writes them


def copy(*arrays) -> Arrays:
    """The same arrays, with pools that may be overwritten."""
    return tuple(x.copy() if i in POOLS else x for i, x in enumerate(arrays))


def renew(arrays: Arrays, result) -> Arrays:
    """Arguments of the next call, with the pools that the last one returned."""
    return *arrays[: POOLS[0]], *result[-len(POOLS) :], *arrays[POOLS[-1] + 1 :]
