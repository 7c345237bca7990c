#!/usr/bin/env bash
# Puts Triton VERSION under build/triton-VERSION, beside the one that .venv holds: tools/triton.sh VERSION [PYTHON]
# The gate compiles every kernel on it too (python -m tests.gate --triton VERSION).
set -euo pipefail
version=$1
python=${2:-.venv/bin/python}
folder=build/triton-$version
if [ -d "$folder/triton-$version.dist-info" ]; then
    exit 0
fi
# Installed aside and renamed: a download that breaks off leaves nothing that looks whole.
rm -rf "$folder" "$folder.partial"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.partial" "triton==$version"
mv "$folder.partial" "$folder"
