#!/bin/sh
# Make a virtual environment with everything that the project needs.
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
$pip install --quiet --upgrade "pip>=24.1" "setuptools>=77"

# Without an NVIDIA GPU the CPU build of torch will do (200 MB; the CUDA build takes 3 GB).
# Some registries hold the CPU build under the plain name; else uv knows where it lies.
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
        || say "not found; the registry's own build is taken (a larger download)"
fi

say "packages (about 500 MB the first time; a few minutes)"
$pip install --constraint constraints.txt --editable '.[agents,eval,plots,serve,sweeps,dev]' \
    > "$venv/setup.log" 2>&1 || { tail -n 30 "$venv/setup.log" >&2; exit 1; }
say "done: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
