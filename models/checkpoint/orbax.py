"""Converted models: weights in an Orbax checkpoint, shape and tokenizer beside them.

Layout: `jaxinfer.json` (format, configuration, generation defaults, size and checksum of every file
of weights), `weights/` (Orbax), `tokenizer.json` and `tokenizer_config.json` (Hugging Face's).
"""

import concurrent.futures
import dataclasses
import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.models.checkpoint.base import GenerationDefaults
from jaxinfer.models.checkpoint.generation import recommended_sampling
from jaxinfer.models.checkpoint.header_numbers import token_ids
from jaxinfer.models.checkpoint.huggingface import checked_tokenizer, read_json
from jaxinfer.models.checkpoint.orbax_parts import StoredArray
from jaxinfer.models.checkpoint.orbax_write import write_weights
from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import CheckpointError
from jaxinfer.models.tokenizer.tokenizer import Tokenizer

FILE = "jaxinfer.json"
FORMAT = 1


class OrbaxCheckpoint:
    """A directory written by `save_orbax`; see `Checkpoint`."""

    def __init__(self, path: Path):
        """Open a directory.

        Raises:
            CheckpointError: a file is missing, damaged, or of another format.
        """
        self.path = str(path)
        self._folder = path
        values = read_json(path / FILE)
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path / FILE}: format {values.get('format')!r} is unknown; expected {FORMAT}"
            )
        try:
            self.config = _config(values["config"])
            generation = values["generation"]
            self.generation = GenerationDefaults(
                eos_token_ids=token_ids(generation["eos_token_ids"], "eos_token_ids"),
                sampling=recommended_sampling(generation["sampling"]),
            )
            self._checksums = {str(k): int(v) for k, v in values["weights_crc32"].items()}
            self._sizes = {str(k): int(v) for k, v in values["weights_bytes"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / FILE}: {error}") from error
        _check_sizes(path / "weights", self._sizes)
        self._checked = False
        self._weights: dict[str, Any] | None = None

    def read(self, name: str) -> np.ndarray:
        """One weight by canonical name; see `Checkpoint.read`.

        The first call reads all weights, and each is forgotten when it is given out, so that
        a model is not in memory twice; asking again reads again.
        """
        if self._weights is None or name not in self._weights:
            _check_contents(self._folder / "weights", self._checksums)
            self._weights = _restore(self._folder / "weights")
        try:
            return np.asarray(self._weights.pop(name))
        except KeyError:
            raise CheckpointError(f"{self.path}: weight {name} is missing") from None

    def read_part(self, name: str) -> StoredArray:
        """One weight by canonical name, of which only the parts are read that are asked for.

        The first call compares checksums. Of several processes each does so for some of the files:
        what one finds ends all.

        Raises:
            CheckpointError: the weight is missing, or a file is damaged.
        """
        if not self._checked:
            self._check_share()
            self._checked = True
        return StoredArray(self._folder / "weights", name)

    def _check_share(self) -> None:
        """Compare checksums of this process's share of the files."""
        largest_first = sorted(self._checksums, key=lambda file: (-self._sizes.get(file, 0), file))
        mine = largest_first[jax.process_index() :: jax.process_count()]
        _check_contents(self._folder / "weights", {file: self._checksums[file] for file in mine})

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights; see `Checkpoint.tokenizer`."""
        return checked_tokenizer(self._folder, self.config.vocab_size)


def save_orbax(
    path: Path,
    model: Decoder,
    *,
    tokenizer: Tokenizer | None = None,
    generation: GenerationDefaults | None = None,
) -> None:
    """Write a model so that `open_checkpoint` reads it back.

    Everything is written beside the target and renamed at the end: after an error, a full disk
    or Ctrl-C nothing is left.

    Args:
        path: Directory to create.
        model: Its weights are stored in their dtype.
        tokenizer: Stored beside them.
        generation: Stored beside them.

    Raises:
        FileExistsError: `path` exists.
        OSError: it cannot be written; names `path` as given.
    """
    target = Path(path).absolute()
    check_target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write(scratch, model, tokenizer, generation or GenerationDefaults())
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_target(path)  # somebody else was quicker
        raise _about(path, error) from error


def check_target(path: Path) -> None:
    """Whether a directory can be created there, before there is anything to write.

    Raises:
        FileExistsError: `path` exists.
        OSError: nothing can be created in the folder that it would be in; names `path`.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another name")
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        # Permissions alone do not tell: of file systems that are read-only, or as root.
        tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=folder).cleanup()
    except OSError as error:
        raise _about(path, error) from error


def _about(path: Path, error: OSError) -> OSError:
    """The same error of `path`, in place of a scratch file that nobody has heard of."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def _write(
    folder: Path, model: Decoder, tokenizer: Tokenizer | None, generation: GenerationDefaults
) -> None:
    write_weights(folder / "weights", dict(model.canonical_weights()))
    values = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "generation": dataclasses.asdict(generation),
        "weights_bytes": _sizes(folder / "weights"),
        "weights_crc32": _checksums(folder / "weights"),
    }
    (folder / FILE).write_text(json.dumps(values, indent=2), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def _files(folder: Path) -> dict[str, Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def _sizes(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in _files(folder).items()}


def _checksums(folder: Path, among: Iterable[str] | None = None) -> dict[str, int]:
    files = _files(folder)
    if among is not None:
        files = {name: files[name] for name in among if name in files}
    # zlib lets go of the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return dict(zip(files, pool.map(_crc32, files.values()), strict=True))


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def _check_sizes(folder: Path, expected: dict[str, int]) -> None:
    """Find missing and truncated files before Orbax does, whose messages do not name them."""
    found = _sizes(folder)
    for name, size in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing")
        if found[name] != size:
            raise CheckpointError(
                f"{folder / name}: truncated or corrupt: {found[name]} bytes, expected {size}"
            )


def _check_contents(folder: Path, expected: dict[str, int]) -> None:
    """Find changed bytes: most would be read as other weights, without an error."""
    try:
        found = _checksums(folder, expected)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for name, checksum in expected.items():
        if found.get(name) != checksum:
            raise CheckpointError(f"{folder / name}: corrupt: its checksum is another")


def _restore(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder.absolute()).item_metadata
            if stored is None:
                raise CheckpointError(f"{folder}: damaged Orbax checkpoint (unreadable metadata)")
            # As numpy arrays: the devices that the file was written from need not be here.
            restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
            return dict(
                checkpointer.restore(
                    folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=restore_args)
                )
            )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: damaged Orbax checkpoint ({error})") from error


def _config(values: dict[str, Any]) -> DecoderConfig:
    values = dict(values, local_layers=tuple(values["local_layers"]))
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return DecoderConfig(**values)
