#!/usr/bin/env bash
# Style, formatting, types and examples; all are run, whatever fails: lint.sh VENV
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$1/bin
failed=()

check() {
  echo "+ $*"
  "$bin/$@" </dev/null || failed+=("$*")
}

check ruff check --quiet .
check ruff format --check --quiet .
check pyright
check python -m pytest -q --doctest-modules jaxinfer bench
check python scripts/doctest_markdown.py README.md CONTRIBUTING.md docs

if (( ${#failed[@]} )); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "All checks passed."
