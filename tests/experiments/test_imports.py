"""The import graph of the experiments: no circles, and nothing imports a program but a program."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from unittest import mock

import pytest

import experiments

ROOT = Path(experiments.__file__).parent
SHARED = {"contexts", "launch", "llama_cpp", "score_model"}
"""Files of the root that are no programs."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
PROGRAMS = {name_of(path) for path in ROOT.glob("*.py") if path.stem not in {"__init__", *SHARED}}


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of the experiments that a module imports, also for type checking or in functions."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                names.add(module if module in FILES else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(names & FILES.keys())


def test_no_files_import_each_other_in_a_circle():
    assert sum(len(imports(name)) for name in FILES) > 150, "imports are found"
    try:
        TopologicalSorter({name: imports(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_programs_import_programs():
    assert {"experiments.train", "experiments.evaluate"} <= PROGRAMS
    wrong = [
        f"{name} imports {', '.join(imports(name) & PROGRAMS)}"
        for name in FILES
        if name not in PROGRAMS and imports(name) & PROGRAMS
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_study():
    def package(name):
        return tuple(name.split(".")[:3])

    wrong = [
        f"{name} imports {to}"
        for name in FILES
        for to in imports(name)
        if to.startswith("experiments.studies.") and package(to) != package(name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("experiments.compare", ("torch", "transformers", "wandb")),
        ("experiments.study.loggers", ("torch", "matplotlib", "wandb")),
    ],
)
def test_large_libraries_are_not_loaded_where_they_are_not_needed(module, unneeded):
    code = f"import sys, {module}; print([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_root_has_few_files():
    assert len(list(ROOT.glob("*.py"))) <= 20


def test_without_the_packages_of_a_checkout_one_sentence_says_what_to_run():
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ImportError, match="run `make setup`") as raised,
    ):
        importlib.reload(experiments)
    assert raised.value.name == "experiments", "runpy prints these as one line"
