#!/usr/bin/env bash
# Fetch the default model and answer $PROMPT: demo.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
echo "+ jaxinfer generate \"$PROMPT\" --max-tokens 128"
"$1/bin/jaxinfer" generate "$PROMPT" --max-tokens 128
echo
echo "Next: $1/bin/jaxinfer chat, or README.md."
