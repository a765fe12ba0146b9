"""The import graph of the package: layers, and no circle between files.

Every import counts: those for type checking, those inside functions, and the re-exports of a
package's ``__init__``.
"""

import ast
from collections.abc import Callable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import rap_env

ROOT = Path(rap_env.__file__).parent

LAYERS = (
    (
        "version", "errors", "extras", "paths", "plugins", "specs", "artifacts", "levels",
        "plan", "request", "memory", "ladder",
    ),
    ("workload",),
    ("models",),
    ("scoring",),
    ("importance",),
    ("reward",),
    ("context",),
    ("policies",),
    ("render", "envs", "leaderboard"),
    ("runtime",),
    ("serving",),
    ("command_options", "export"),
    ("installation", "cli", "__init__"),
)  # fmt: skip
"""Files and packages of `rap_env` from the ground up; each may import its own layer and lower."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    """``scoring.store`` for ``rap_env/scoring/store.py``, ``scoring`` for its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def top(name: str) -> str:
    """The file or package of the first level that holds a module."""
    return name.split(".")[0]


def targets(node: ast.AST) -> list[str]:
    """The modules of `rap_env` that an import statement names."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        base = node.module or ""
        found = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return []
    inside = [name for name in found if name.split(".")[0] == "rap_env"]
    return [module_of(name.split(".")[1:]) for name in inside]


def module_of(parts: list[str]) -> str:
    """The longest prefix of a dotted name that is a module; the rest are names in it."""
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FILES:
            return ".".join(parts[:end])
    return "__init__"


@cache
def imports(name: str) -> tuple[tuple[str, int], ...]:
    """What a module imports, with the line."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    found = [(to, node.lineno) for node in ast.walk(tree) for to in targets(node)]
    return tuple(dict.fromkeys(pair for pair in found if pair[0] != name))


def where(name: str, line: int) -> str:
    return f"{FILES[name].relative_to(ROOT.parent)}:{line}"


def test_every_file_has_a_layer():
    assert len(FILES) > 100
    assert {top(name) for name in FILES} == set(LAYER)


def check(is_wrong: Callable[[str, str], bool]) -> None:
    """No module may import another one where `is_wrong(module, imported)` says so."""
    wrong = [
        f"{where(name, line)} imports {to}"
        for name in FILES
        for to, line in imports(name)
        if is_wrong(name, to)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_never_go_up():
    check(lambda name, to: LAYER[top(to)] > LAYER[top(name)])


def test_the_runtime_does_not_need_the_environments():
    check(lambda name, to: top(name) in ("runtime", "serving") and top(to) == "envs")


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({name: [to for to, _ in imports(name)] for name in FILES}).prepare()


def test_nothing_in_a_package_imports_the_package_itself():
    check(lambda name, to: name.startswith(f"{to}."))
