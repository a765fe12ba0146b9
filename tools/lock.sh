#!/bin/sh
# Write the versions installed in a virtual environment into constraints.txt.
# Usage: tools/lock.sh VENV
set -eu
pip="$1/bin/python -m pip --disable-pip-version-check"
new=$(mktemp)
{
    echo '# The versions that `make setup` installs, so that it resolves the same next month.'
    echo '# After a change to the dependencies in pyproject.toml: `make lock`.'
    # A range: the CPU and the CUDA build of one release have different local versions.
    $pip list --format freeze | sed -n 's/^torch==\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' |
        while read -r major minor; do echo "torch>=$major.$minor,<$major.$((minor + 1))"; done
    $pip list --format freeze --exclude-editable |
        grep -viE '^(torch|setuptools|pip|wheel|uv|nvidia-.*|triton)==' | sort -f
} > "$new"
mv "$new" constraints.txt
