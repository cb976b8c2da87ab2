"""Compile equal programs once, where many tests build the same engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keep what is compiled in `folder`, of this process only: a file may be read half-written.

    Every engine has functions of its own, so JAX compiles them anew for each. To write a file takes
    about a quarter of the time of compiling it, so it pays where programs come again.
    """
    values = {
        "jax_compilation_cache_dir": str(folder),
        # Quicker ones are not worth a file.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is one was decided at the first program
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
