#!/bin/sh
# Make a virtual environment with the package, its extras and the dependency groups.
# Usage: tools/setup.sh PYTHON VENV
set -eu
python=$1
venv=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "Python 3.11 or newer is needed, but '$python' is $("$python" --version 2>&1 || true)." \
         "Name another one: make setup PYTHON=python3.11" >&2
    exit 1
}

say() { echo "setup: $*"; }

say "virtual environment in $venv"
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" # dependency groups need pip 25.1

# Without an NVIDIA GPU the CPU build of torch is enough (200 MB; the CUDA build takes 3 GB).
# Some registries have the CPU build under the plain name; otherwise uv finds it.
cpu_build_is_default() {
    $pip install --quiet --dry-run --no-deps --ignore-installed --constraint constraints.txt \
        --report - torch 2>/dev/null | grep -q '"version": "[^"]*+cpu"'
}
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
    && ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! cpu_build_is_default; then
    say "no NVIDIA GPU: looking for the CPU build of torch"
    $pip install --quiet "uv>=0.6"
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu \
        --constraint constraints.txt torch 2> /dev/null \
        || say "not found; using the default build of the registry (a larger download)"
fi

# Modules are compiled when they are first imported: that is a fifth of them.
say "packages (about 600 MB the first time; a few minutes)"
$pip install --no-compile --constraint constraints.txt --editable '.[eval,plots,serve,structured]' \
    --group agents --group sweeps --group dev --group docs \
    > "$venv/setup.log" 2>&1 || { tail -n 30 "$venv/setup.log" >&2; exit 1; }
say "done: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
