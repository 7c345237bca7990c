#!/usr/bin/env bash
# Puts packages into a folder of their own, beside what .venv holds: tools/overlay.sh FOLDER PYTHON REQUIREMENT...
# With that folder first on PYTHONPATH a test runs on other versions of them. Nothing is done if FOLDER exists.
set -euo pipefail
folder=$1
python=$2
shift 2
if [ -d "$folder" ]; then
    exit 0
fi
# Installed aside and renamed: a download that breaks off leaves nothing that looks whole.
rm -rf "$folder.partial"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.partial" "$@"
mv "$folder.partial" "$folder"
