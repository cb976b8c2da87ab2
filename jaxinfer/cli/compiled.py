"""One line where programs that XLA compiled cannot be kept or read; damaged ones are removed.

JAX warns of each program, with a line of its own source and without the folder, and leaves what a
full disk cut off where the next start finds it.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WARNING = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.*?)': \w+: (.*)", re.DOTALL
)
_ADVICE = {
    "reading": ("cannot be read from", "delete that folder, or name another"),
    "writing": ("cannot be kept in", "make room there, or name another"),
}


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, the first of JAX's warnings becomes a line of ours, and the others nothing."""
    show, told = warnings.showwarning, False

    def showwarning(message: Any, *details: Any, **named: Any) -> None:
        nonlocal told
        found = _WARNING.match(str(message))
        if not found:
            show(message, *details, **named)
            return
        text = _handle(*found.groups())
        if not told:
            told = True
            with contextlib.suppress(OSError):
                print(f"warning: {text}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        # Each: two programs may have the same name, and Python shows equal warnings once.
        warnings.filterwarnings("always", _WARNING.pattern, UserWarning)
        warnings.showwarning = showwarning
        yield


def _handle(doing: str, program: str, reason: str) -> str:
    """Remove what is damaged; what to say."""
    import jax

    folder = jax.config.jax_compilation_cache_dir or ""
    removed = _remove_damaged(Path(folder), program)
    if removed and doing == "reading":
        return f"damaged programs in {folder} are removed and compiled anew"
    what, advice = _ADVICE[doing]
    if not Path(folder).is_dir():  # nor can it be made: JAX has tried
        advice = "name another folder"
    reason = re.sub(r"^\[Errno \d+\] ", "", " ".join(reason.split()))
    return (
        f"compiled programs {what} {folder} ({reason}); {advice} by JAX_COMPILATION_CACHE_DIR "
        "(empty: none)"
    )


def _remove_damaged(folder: Path, program: str) -> int:
    """Remove entries of a program that cannot be unpacked; how many.

    One that another process is writing may be among them, which then is not kept.
    """
    removed = 0
    with contextlib.suppress(ImportError, OSError):
        from jax._src.compilation_cache import decompress_executable

        for path in folder.iterdir():
            if not (path.name.startswith(f"{program}-") and path.name.endswith("-cache")):
                continue
            content = path.read_bytes()
            try:
                decompress_executable(content)
            except Exception:  # of whichever library JAX takes
                path.unlink()
                removed += 1
    return removed
