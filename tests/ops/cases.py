"""Specs as parameters of tests, and random inputs."""

import contextlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def cases(specs: Iterable[Any], *tags: str) -> list:
    """`pytest.param`s, with readable ids, of the specs with one of `tags`; all without tags."""
    return [
        pytest.param(spec, id=spec.name.replace(" ", "-"))
        for spec in specs
        if not tags or spec.tag in tags
    ]


def normal(seed: int, shape: tuple[int, ...], dtype: Any = "float32", size: float = 1.0):
    """Normal random numbers, made by NumPy: nothing to compile."""
    numbers = size * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(numbers.astype(jnp.dtype(dtype)))


@contextlib.contextmanager
def quick_compilation():
    """On CPUs, leave XLA's optimisations out: on code that runs once they cost more than they save.

    For inputs and for the interpreter, not for what is tested on its own.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, before or jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update(name, before)


_make = jax.jit(lambda make_inputs, spec, key: make_inputs(spec, key), static_argnums=(0, 1))


def inputs(make_inputs, spec, seed: int) -> tuple:
    """Random inputs of a spec, compiled as one."""
    with quick_compilation():
        return _make(make_inputs, spec, jax.random.key(seed))


def shapes_of(make_inputs, spec) -> tuple:
    """Shapes and dtypes of a spec's inputs, without their data: primary cases are large."""
    return jax.eval_shape(lambda key: make_inputs(spec, key), jax.random.key(0))


def same_bits(got, want) -> None:
    """Fail unless both trees hold the same bits (NaN equals NaN)."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
