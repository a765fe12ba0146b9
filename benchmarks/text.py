"""Records as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summary(record: Mapping[str, Any]) -> str:
    """A record as lines for people: targets first, then what was measured, then notes."""
    lines = [f"{record['benchmark']} on {processor(record)}"]
    for target in record["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        lines.append(f"  {verdict:<6} {target['what']}: {reached(target)}, wanted {bound(target)}")
    lines += _lines(record["measured"])
    return "\n".join([*lines, *(f"  Note: {note}" for note in record["notes"])])


def processor(record: Mapping[str, Any]) -> str:
    """What gave a record's numbers: the GPU, or the CPU with its number of threads."""
    machine = record["machine"]
    if record["device"].startswith("cuda"):
        return str(machine.get("gpu", record["device"]))
    threads = machine.get("threads")
    shown = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    return f"{machine['cpu']}{shown}"


def reached(target: Mapping[str, Any]) -> str:
    """A target's number as text, with its spread if there is one."""
    text = _short(target["reached"])
    if target["low"] is None:
        return text
    return f"{text} [{_short(target['low'])}, {_short(target['high'])}]"


def bound(target: Mapping[str, Any]) -> str:
    """What a target asks for, as text."""
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
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
