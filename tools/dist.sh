#!/bin/sh
# Build sdist and wheel in dist/, check them, and try each in an empty environment: the command `rap`
# and the first Python snippet of README.md.
# Usage: tools/dist.sh PYTHON
set -eu
export PIP_DISABLE_PIP_VERSION_CHECK=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$1" -m venv "$folder/build"
"$folder/build/bin/pip" install --quiet build twine
rm -rf dist
"$folder/build/bin/python" -m build --outdir dist . > "$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
"$folder/build/bin/python" -m twine check --strict dist/*

awk '/^```$/ { if (inside) exit } inside; /^```python$/ { inside = 1 }' README.md > "$folder/snippet.py"
for file in "$PWD"/dist/*; do
    "$1" -m venv --clear "$folder/empty"
    "$folder/empty/bin/pip" install --quiet "$file"
    (cd "$folder" && empty/bin/rap --version && empty/bin/python snippet.py)
done
