"""The table of benchmarks from their records: ``python -m benchmarks.table [FOLDER]``.

Where there are records of a GPU, a second table follows: in what they differ from the CPU's.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, bound, processor, reached

_HEAD = "| Benchmark | What | Against | Reached | Target | Met | Device |"
_DIFFERENCES = "| Benchmark | What | CPU | GPU | Target |"
_DIFFERENCES_RULE = "| :--- | :--- | ---: | ---: | ---: |"
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


def differences(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the targets that a GPU meets and the CPU does not, or the reverse.

    A target of a benchmark that ran on one of the two alone is in it too. Benchmarks without any
    record of a GPU are left out. Targets are the same if their texts are, apart from numbers.
    """
    sides: dict[str, dict[str, dict[tuple[str, int], Mapping[str, Any]]]] = {}
    for record in records:
        side = record["device"].partition(":")[0]
        sides.setdefault(record["benchmark"], {})[side] = _numbered(record["targets"])
    rows = [_DIFFERENCES, _DIFFERENCES_RULE]
    for benchmark, found in sides.items():
        cpu, gpu = found.get("cpu", {}), found.get("cuda", {})
        for key in dict.fromkeys((*cpu, *gpu)) if gpu else ():
            pair = (cpu.get(key), gpu.get(key))
            if pair[0] is None or pair[1] is None or pair[0]["met"] != pair[1]["met"]:
                rows.append(_difference(benchmark, *pair))
    return "\n".join(rows)


def _numbered(
    targets: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Targets by their text without numbers, and a number of their own where that is the same."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for target in targets:
        text = re.sub(r"[\d.,]+", "", target["what"])
        free = (number for number in itertools.count() if (text, number) not in found)
        found[text, next(free)] = target
    return found


def _difference(
    benchmark: str, cpu: Mapping[str, Any] | None, gpu: Mapping[str, Any] | None
) -> str:
    shown = [
        "-" if target is None else f"{reached(target)} ({'met' if target['met'] else 'missed'})"
        for target in (cpu, gpu)
    ]
    either = gpu or cpu or {}
    cells = (f"`{benchmark}`", either["what"], *shown, bound(either))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    found = read_records(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    if not found:
        sys.exit("No records here; run a benchmark first, such as `python -m benchmarks.step`.")
    sys.stdout.write(markdown(found) + "\n")
    if any(record["device"].startswith("cuda") for record in found):
        table = differences(found)
        same = "none: the GPU meets and misses the same targets as the CPU\n"
        sys.stdout.write("\nDifferences between the GPU and the CPU:\n\n")
        sys.stdout.write(table + "\n" if table.count("\n") > 1 else same)
