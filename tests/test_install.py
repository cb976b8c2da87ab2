"""What `scripts/install.sh` says where pip fails."""

import subprocess
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

CONFLICT = """\
ERROR: Cannot install jax==0.12.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    The user requested jax==0.12.0
    The user requested (constraint) jax==0.11.2

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/
"""
NO_INDEX = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError': /simple/jax/
ERROR: Could not find a version that satisfies the requirement jax<0.13 (from versions: none)
ERROR: No matching distribution found for jax<0.13
"""
BUILD = """\
  error: subprocess-exited-with-error
      ModuleNotFoundError: No module named 'setuptools'
      [end of output]
error: metadata-generation-failed
"""


def install(folder: Path, log: str) -> str:
    """Standard error of an installation whose pip writes this and fails."""
    (folder / "bin").mkdir()
    (folder / "log").write_text(log)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n[ $3 = --version ] && exit\ncat '{folder}/log' >&2\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        [REPOSITORY / "scripts" / "install.sh", folder, "run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(("log", "reason"), [
    (CONFLICT, "Cannot install jax==0.12.0 because these package versions have conflicting "
               "dependencies."),
    (NO_INDEX, "No matching distribution found for jax<0.13; can a package index be reached?"),
    (BUILD, "ModuleNotFoundError: No module named 'setuptools'"),
    ("Killed\n", "see the log"),
], ids=["conflict", "no index", "build", "unknown"])  # fmt: skip
def test_the_reason_names_the_package_or_the_index(tmp_path, log, reason):
    want = f"error: pip could not install jaxinfer: {reason} (all of it: {tmp_path}/pip.log)\n"
    assert install(tmp_path, log) == want
