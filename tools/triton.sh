#!/usr/bin/env bash
# Puts Triton VERSION under build/triton-VERSION, beside the one that .venv holds: tools/triton.sh VERSION [PYTHON]
# The gate compiles every kernel on it too (python -m tests.gate --triton VERSION).
set -euo pipefail
exec bash tools/overlay.sh "build/triton-$1" "${2:-.venv/bin/python}" "triton==$1"
