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

# Types take about as long as the examples, and one core each.
types=$(mktemp)
"$bin/pyright" </dev/null >"$types" 2>&1 &
pyright=$!
trap 'kill "$pyright" 2>/dev/null; rm -f "$types"' EXIT

check ruff check --quiet .
check ruff format --check --quiet .
check python -m pytest -q --doctest-modules jaxinfer bench
check python scripts/doctest_markdown.py README.md CONTRIBUTING.md docs

echo "+ pyright"
wait "$pyright" || failed+=(pyright)
cat "$types"

if (( ${#failed[@]} )); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "All checks passed."
