"""Runs the cells of a notebook without Jupyter.

``python -m tests.examples.notebooks examples/first_steps.ipynb`` runs it and stores the outputs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

Replacements = dict[str, str]


def run(notebook: dict[str, Any], changes: Replacements | None = None) -> dict[str, Any]:
    """Run all cells of code, store their outputs in the notebook, and return the names they made.

    Args:
        notebook: The content of the file.
        changes: Texts that replace others in the cells, such as fewer steps; each must occur.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    missing = dict(changes or {})
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for number, cell in enumerate(cells, start=1):
        source = "".join(cell["source"])
        for old, new in (changes or {}).items():
            if old in source:
                source, _ = source.replace(old, new), missing.pop(old, None)
        cell["execution_count"], cell["outputs"] = number, _outputs(source, names)
    assert not missing, f"no cell has {list(missing)}"
    return names


def _outputs(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell, and return what it printed and the value of its last expression."""
    source = re.sub(r"^( *)%pip .*", r"\1assert False, 'not installed'", source, flags=re.MULTILINE)
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        value = last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    """A value as text, and as a picture if it is one."""
    data = {"text/plain": [repr(value) if not hasattr(value, "_repr_png_") else "A picture"]}
    if hasattr(value, "_repr_png_"):
        small = value.quantize(64)  # of drawn areas: a tenth of the bytes
        file = io.BytesIO()
        small.save(file, format="png", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return data


def main(path: Path) -> None:
    """Run a notebook and write it with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run(notebook)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "execute_result":
                output["execution_count"] = cell["execution_count"]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
