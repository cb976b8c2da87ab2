#!/usr/bin/env bash
# Create a virtual environment if need be, and install jaxinfer into it.
#
#   install.sh VENV run      the library; with JAX for CUDA where the machine has an NVIDIA GPU
#   install.sh VENV dev      the same, and what tests and checks need
#   install.sh VENV newest   what the tests of the ops need, newest versions, no constraints
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 kind=$2

# The extra that brings JAX for this machine's NVIDIA driver, with a comma before it; or nothing.
gpu_extra() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) ||
    return 0
  driver=${driver%%.*}
  [[ $driver =~ ^[0-9]+$ ]] || return 0
  if (( driver >= 580 )); then echo ,cuda13; elif (( driver >= 525 )); then echo ,cuda12; fi
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(scripts/find_python.sh)
  echo "Creating $venv with $("$python" --version)."
  "$python" -m venv --clear "$venv"
fi

gpu=$(gpu_extra)
case $kind in
  run)    what=(-e ".[${gpu#,}]" -c constraints.txt) ;;
  dev)    what=(-e ".[dev,hf$gpu]" -c constraints.txt) ;;
  newest) what=(-e ".[dev$gpu]" --upgrade --upgrade-strategy eager) ;;
  *)      echo "error: unknown kind of installation: $kind" >&2; exit 2 ;;
esac
what=("${what[@]/#.\[\]/.}")  # no extras

echo "Installing jaxinfer into $venv${gpu:+ with JAX for ${gpu#,}} (a minute or two the first time)."
log=$venv/pip.log
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${what[@]}" \
    >"$log" 2>&1 </dev/null; then
  # pip's own verdict is in capitals; where a build failed, it is indented. Of a conflict the last
  # one links to a manual, the one before names the packages.
  reason=$(grep -E '^ *(ERROR|[A-Za-z]*Error): ' "$log" | grep -v 'ERROR: ResolutionImpossible' |
    tail -n 1 | sed -E 's/^ *(ERROR: )?//' || true)
  [[ $reason == "No matching distribution"* ]] && reason+="; can a package index be reached?"
  echo "error: pip could not install jaxinfer: ${reason:-see the log} (all of it: $log)" >&2
  exit 1
fi
"$venv/bin/python" -c '
import importlib.metadata as m
print("Installed", ", ".join(f"{n} {m.version(n)}" for n in ("jaxinfer", "jax", "flax")) + ".")'
