#!/usr/bin/env bash
# Print the path of a Python 3.12 or newer that can make virtual environments; else say how to
# get one. $PYTHON, if set, is the only candidate.
set -uo pipefail

found=()

# Print the interpreter behind a command and succeed if it will do; else remember why not.
try() {
  local facts
  facts=$("$@" -c '
import importlib.util, platform, sys
usable = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
print(int(sys.version_info >= (3, 12)), int(usable), platform.python_version(), sys.executable)
' 2>/dev/null </dev/null) || return 1
  local new usable version path
  read -r new usable version path <<<"$facts"
  if [[ $new == 1 && $usable == 1 ]]; then
    echo "$path"
    exit 0
  fi
  local why="too old"
  [[ $new == 1 ]] && why="without the venv module; install the package python${version%.*}-venv"
  found+=("Python $version at $path ($why)")
}

if [[ -n ${PYTHON:-} ]]; then
  try "$PYTHON"
  found=("${found[@]:-PYTHON=$PYTHON does not run}")
else
  for name in python3 python3.12 python3.13 python3.14; do
    try "$name"
  done
  if command -v pyenv >/dev/null; then
    while read -r version; do
      try "$(pyenv root)/versions/$version/bin/python"
    done < <(pyenv versions --bare 2>/dev/null)
  fi
  if command -v uv >/dev/null; then
    try "$(uv python find '>=3.12' 2>/dev/null)"
  fi
fi

{
  echo "error: jaxinfer needs Python 3.12 or newer."
  (( ${#found[@]} )) && printf 'found: %s\n' "${found[@]}" | sort -u
  cat <<'TEXT'
Get one in one of these ways, then run make again:
  uv python install 3.12
  pyenv install 3.12
  apt install python3.12 python3.12-venv    (or what your distribution calls them)
or name one that is already there: make … PYTHON=/path/to/python3.12
TEXT
} >&2
exit 1
