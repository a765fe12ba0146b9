"""Every benchmark can be imported, and importing measures nothing and loads no model."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
PROGRAMS = (
    "apply", "decide", "decode", "levels", "live", "load", "memory", "ray_workers", "repair",
    "resident",
)  # fmt: skip


def test_the_benchmarks_were_found():
    assert set(PROGRAMS) <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.slow
def test_importing_loads_no_model():
    names = ", ".join(f"benchmarks.{name}" for name in PROGRAMS)
    loaded = "[name for name in sys.modules if name.startswith('transformers.models.')]"
    code = f"import sys, {names}; print(any('.modeling_' in name for name in {loaded}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_the_makefile_lists_every_benchmark():
    lines = Path(benchmarks.__path__[0], "..", "Makefile").read_text().splitlines()
    listed = next(line for line in lines if line.startswith("BENCHMARKS :=")).split(":=")[1].split()
    assert set(PROGRAMS) <= set(listed)
    assert {name for name in listed if name not in MODULES} == set()
