"""A benchmark's record, and the table of all records: ``python -m benchmarks.record [FOLDER]``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.study.run_folder import cpuinfo, git_state, machine_facts, package_versions
from rap_env.artifacts import atomic_write

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
"""Folder of the committed records."""

_PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "rap-env")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
_HEAD = (
    "| Benchmark | What | Against | Reached | Target | Met | Device |\n"
    "| :--- | :--- | :--- | ---: | ---: | :---: | :--- |"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound for a measured number, and the number that was reached.

    Attributes:
        what: What the number is, with its unit or what it is a ratio of.
        at_least: Lowest value that meets it, or None.
        at_most: Highest value that meets it, or None.
        reached: The median that was measured.
        against: The reference of the comparison.
        low: Lowest measurement, where there are several.
        high: Highest measurement.
    """

    what: str
    at_least: float | None
    at_most: float | None
    reached: float
    against: str = ""
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"The target {self.what!r} needs at_least or at_most.")

    @classmethod
    def of(
        cls,
        what: str,
        measured: Mapping[str, float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        against: str = "",
    ) -> Target:
        """A target for measurements as `spread` or `ratios` returns them; the median decides."""
        median, low, high = measured["median"], measured["low"], measured["high"]
        return cls(what, at_least, at_most, median, against, low, high)

    @property
    def met(self) -> bool:
        """Whether the number is within its bounds."""
        above = self.at_least is None or self.reached >= self.at_least
        return above and (self.at_most is None or self.reached <= self.at_most)


def write_record(
    name: str,
    *,
    device: str,
    settings: Any,
    targets: Sequence[Target],
    measured: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write one benchmark's record as JSON and print its targets.

    Args:
        name: Name of the benchmark; the file is ``NAME-cpu.json`` or ``NAME-cuda.json``.
        device: Device that was measured, such as ``"cpu"`` or ``"cuda:0"``.
        settings: A dataclass; its `results_dir` is the folder of the record.
        targets: The targets with the numbers that were reached.
        measured: All other measurements; plain values, with units in the names.
        notes: Sentences that explain the numbers, such as what bounds a missed target.
    """
    settings_used = dataclasses.asdict(settings)
    folder = Path(settings_used.pop("results_dir"))
    packages = {name.replace("-", "_"): v for name, v in package_versions(_PACKAGES).items()}
    record = {
        "benchmark": name,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **(git_state() or {"commit": None, "dirty": None}),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **packages},
        "settings": settings_used,
        "targets": [{**dataclasses.asdict(target), "met": target.met} for target in targets],
        "measured": dict(measured),
        "notes": list(notes),
    }
    path = folder / f"{name}-{device.partition(':')[0]}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    sys.stdout.write(f"{targets_table([record])}\nRecord: {path}\n")
    return path


def machine() -> dict[str, Any]:
    """The machine, as plain values for a record."""
    flags = cpuinfo().get("flags", "").split()
    return {
        **machine_facts(),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def committed_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All records of a folder, in order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def targets_table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each target: median [lowest, highest] and its bounds."""
    rows = [_HEAD]
    for record in records:
        for target in record["targets"]:
            cells = (
                f"`{record['benchmark']}`",
                target["what"],
                target["against"] or "-",
                _reached(target),
                _bound(target),
                "yes" if target["met"] else "no",
                _processor(record),
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _processor(record: Mapping[str, Any]) -> str:
    """The GPU, or the CPU with its number of threads."""
    machine = record["machine"]
    if record["device"].startswith("cuda"):
        return str(machine.get("gpu", record["device"]))
    threads = machine.get("threads")
    shown = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    name = re.sub(r"\((R|TM)\)| Processor| CPU", "", machine["cpu"])
    return f"{name}{shown}"


def _reached(target: Mapping[str, Any]) -> str:
    text = _short(target["reached"])
    if target["low"] is None:
        return text
    return f"{text} [{_short(target['low'])}, {_short(target['high'])}]"


def _bound(target: Mapping[str, Any]) -> str:
    sides = (("≥", target["at_least"]), ("≤", target["at_most"]))
    return " and ".join(f"{sign} {_short(value)}" for sign, value in sides if value is not None)


def _short(value: float) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}"


if __name__ == "__main__":
    committed = committed_records(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    if not committed:
        sys.exit("No records here; run a benchmark first, such as `python -m benchmarks.step`.")
    sys.stdout.write(targets_table(committed) + "\n")
