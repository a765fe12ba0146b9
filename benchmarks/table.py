"""The table of benchmarks from their records: ``python -m benchmarks.table [FOLDER]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, bound, processor, reached

_HEAD = "| Benchmark | What | Against | Reached | Target | Met | Device |"
_RULE = "| :--- | :--- | :--- | ---: | ---: | :---: | :--- |"


def read_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All records of a folder, in order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each target: median [lowest, highest] and its bounds."""
    rows = [_HEAD, _RULE]
    for record in records:
        for target in record["targets"]:
            cells = (
                f"`{record['benchmark']}`",
                target["what"],
                target["against"] or "-",
                reached(target),
                bound(target),
                "yes" if target["met"] else "no",
                processor(record),
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    found = read_records(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    if not found:
        sys.exit("No records here; run a benchmark first, such as `python -m benchmarks.step`.")
    sys.stdout.write(markdown(found) + "\n")
