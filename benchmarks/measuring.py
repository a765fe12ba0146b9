"""What all benchmarks share: settings, measurements in turn, records and their table."""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.json_records import Record, write_text
from experiments.study.run_folder import provenance

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
"""Folder of the committed records."""


@dataclass
class Settings:
    """Settings of every benchmark; each program adds its own in a subclass."""

    repeats: int = 5
    """Measurements of each side; at least 5 for a published number."""
    threads: int | None = None
    """Threads of torch; null for torch's own number."""
    results_dir: str = str(RESULTS)
    """Folder of the record."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")


@dataclass
class ModelSettings(Settings):
    """Settings of a benchmark that runs a live model."""

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"


def open_model(settings: ModelSettings, weights: str = "bf16") -> ElasticLLM:
    """Set torch's threads and load the model, with unquantised weights unless asked otherwise."""
    from rap_env.models.device import use_threads  # these load torch
    from rap_env.models.files.loading import load_llm

    if settings.threads is not None:
        use_threads(settings.threads)
    return load_llm(settings.model, device=settings.device, dtype=settings.dtype, weights=weights)


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side after a first call, in turn (A B A B ...): drift affects all equally.

    Args:
        sides: What to measure, by name. On CUDA the device is synchronised before and after.
        repeats: Measurements of each side.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run))
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of a call, including the work of a CUDA device that is in use."""
    gc.collect()  # so that no side pays for garbage of another one
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - began


def _synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, and their number."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "repeats": len(values),
    }


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """The paired ratios ``slow[i] / fast[i]``: above 1 where `fast` is faster."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def target(
    what: str,
    *values: float,
    at_least: float | None = None,
    at_most: float | None = None,
    against: str = "",
) -> dict[str, Any]:
    """A bound for a measured number, and whether it was reached, as a record has it.

    Args:
        what: What the number is, with its unit or what it is a ratio of.
        *values: Its measurements, of which the median decides.
        at_least: Lowest value that meets the bound.
        at_most: Highest value that meets it.
        against: The reference of the comparison.
    """
    reached = statistics.median(values)
    above = at_least is None or reached >= at_least
    return {
        "what": what,
        "at_least": at_least,
        "at_most": at_most,
        "reached": reached,
        "against": against,
        "low": min(values) if len(values) > 1 else None,
        "high": max(values) if len(values) > 1 else None,
        "met": above and (at_most is None or reached <= at_most),
    }


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """What a benchmark measured on a device: the file ``NAME-cpu.json`` or ``NAME-cuda.json``.

    Attributes:
        benchmark: Name of the benchmark.
        device: Device that was measured, such as ``"cpu"`` or ``"cuda:0"``.
        date: When the measurements ended.
        settings: Its settings.
        targets: What `target` returned.
        measured: All other measurements; plain values, with units in the names.
    """

    record_name = "A benchmark's record"

    benchmark: str
    device: str
    date: str
    settings: dict[str, Any]
    targets: list[dict[str, Any]]
    measured: dict[str, Any]

    @property
    def processor(self) -> str:
        """The GPU, or the CPU with its number of threads."""
        machine = self.provenance["machine"]
        if self.device.startswith("cuda"):
            return str(machine.get("gpu", self.device))
        threads = machine.get("threads")
        shown = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
        name = re.sub(r"\((R|TM)\)| Processor| CPU", "", machine["cpu"])
        return f"{name}{shown}"


def write_record(
    name: str,
    settings: Settings,
    targets: Sequence[dict[str, Any]],
    *,
    device: str = "cpu",
    **measured: Any,
) -> None:
    """Write the record of a benchmark into the folder of its settings, and print its targets.

    For the arguments see `BenchmarkRecord`.
    """
    used = asdict(settings)
    path = Path(used.pop("results_dir"), f"{name}-{device.partition(':')[0]}.json")
    record = BenchmarkRecord(
        benchmark=name,
        device=device,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=provenance(),
        settings=used,
        targets=list(targets),
        measured=measured,
    )
    write_text(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    sys.stdout.write(f"{targets_table([record])}\nRecord: {path}\n")


def committed_records(folder: Path = RESULTS) -> list[BenchmarkRecord]:
    """All records of a folder, in order of their names."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json")))
    return [BenchmarkRecord.from_record(json.loads(text)) for text in texts]


def targets_table(records: Iterable[BenchmarkRecord]) -> str:
    """A Markdown table with a row for each target: median [lowest, highest] and its bounds."""
    from experiments.study.table_format import columns_table, markdown  # these load pandas

    lines = [(record, row) for record in records for row in record.targets]
    columns: dict[str, Callable[[tuple[BenchmarkRecord, Mapping[str, Any]]], str]] = {
        "Benchmark": lambda line: f"`{line[0].benchmark}`",
        "What": lambda line: line[1]["what"],
        "Against": lambda line: line[1]["against"] or "-",
        "Reached": lambda line: _reached(line[1]),
        "Target": lambda line: _bound(line[1]),
        "Met": lambda line: "yes" if line[1]["met"] else "no",
        "Device": lambda line: line[0].processor,
    }
    return markdown(columns_table(lines, columns), left=3)


def _reached(row: Mapping[str, Any]) -> str:
    text = _short(row["reached"])
    return text if row["low"] is None else f"{text} [{_short(row['low'])}, {_short(row['high'])}]"


def _bound(row: Mapping[str, Any]) -> str:
    sides = (("≥", row["at_least"]), ("≤", row["at_most"]))
    return " and ".join(f"{sign} {_short(value)}" for sign, value in sides if value is not None)


def _short(value: float) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}"
