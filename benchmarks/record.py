"""The record of one benchmark: machine and versions, targets, measurements, and its text form."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.comparison.run_folder import cpuinfo, git_state, machine_facts, package_versions
from rap_env.artifacts import atomic_write

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
"""Folder of the committed records."""

_PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "rap-env")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def write_record(
    name: str,
    *,
    device: str,
    settings: Any,
    targets: Sequence[Any],
    measured: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write one benchmark's record as JSON and print it as a short table.

    Args:
        name: Name of the benchmark; the file is ``NAME-cpu.json`` or ``NAME-cuda.json``.
        device: Device that was measured, such as ``"cpu"`` or ``"cuda:0"``.
        settings: A dataclass; its `results_dir`, if it has one, is the folder of the record.
        targets: The targets with the numbers that were reached.
        measured: All other measurements; plain values, with units in the names.
        notes: Sentences that explain the numbers, such as what bounds a missed target.
    """
    chosen = dataclasses.asdict(settings)
    folder = Path(chosen.pop("results_dir", RESULTS))
    record = {
        "benchmark": name,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **(git_state() or {"commit": None, "dirty": None}),
        "machine": machine(),
        "versions": versions(),
        "settings": chosen,
        "targets": [{**dataclasses.asdict(target), "met": target.met} for target in targets],
        "measured": dict(measured),
        "notes": list(notes),
    }
    path = folder / f"{name}-{device.partition(':')[0]}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    sys.stdout.write(summary(record) + f"\nRecord: {path}\n")
    return path


def machine() -> dict[str, Any]:
    """The machine, as plain values for a record."""
    flags = cpuinfo().get("flags", "").split()
    return {
        **machine_facts(),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "memory_bytes": _memory_bytes(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the speed."""
    packages = {name.replace("-", "_"): v for name, v in package_versions(_PACKAGES).items()}
    return {"python": platform.python_version(), **packages}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def summary(record: Mapping[str, Any]) -> str:
    """A record as text: targets first, then other measurements, then notes."""
    lines = [f"{record['benchmark']} on {processor(record)}"]
    for target in record["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        lines.append(f"  {verdict:<6} {target['what']}: {reached(target)}, wanted {bound(target)}")
    lines += _lines(record["measured"])
    return "\n".join([*lines, *(f"  Note: {note}" for note in record["notes"])])


def processor(record: Mapping[str, Any]) -> str:
    """The processor of a record: the GPU, or the CPU with its number of threads."""
    machine = record["machine"]
    if record["device"].startswith("cuda"):
        return str(machine.get("gpu", record["device"]))
    threads = machine.get("threads")
    shown = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    name = re.sub(r"\((R|TM)\)| Processor| CPU", "", machine["cpu"])
    return f"{name}{shown}"


def reached(target: Mapping[str, Any]) -> str:
    """A target's number as text, with its spread if there is one."""
    text = _short(target["reached"])
    if target["low"] is None:
        return text
    return f"{text} [{_short(target['low'])}, {_short(target['high'])}]"


def bound(target: Mapping[str, Any]) -> str:
    """The bounds of a target as text."""
    sides = (("≥", target["at_least"]), ("≤", target["at_most"]))
    return " and ".join(f"{sign} {_short(value)}" for sign, value in sides if value is not None)


def _lines(tree: Mapping[str, Any], name: str = "") -> list[str]:
    """A line for each group of values, under its dotted name."""
    groups = {key: value for key, value in tree.items() if _is_group(value)}
    values = [f"{key} {_short(value)}" for key, value in tree.items() if key not in groups]
    lines = [f"  {name}: {', '.join(values)}" if name else f"  {', '.join(values)}"]
    for key, value in groups.items():
        lines += _lines(value, f"{name}.{key}" if name else key)
    return lines if values else lines[1:]


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and "median" not in value  # a spread is one value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{_short(value['median'])} [{_short(value['low'])}, {_short(value['high'])}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
