"""What all benchmarks share: settings, alternating measurements, targets, records."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from benchmarks.machine import commit, machine, versions
from benchmarks.text import summary
from rap_env.artifacts import atomic_write
from rap_env.errors import RapError

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"
"""Where records lie that the README's table is made from."""

_EXIT_CODE = 2
T = TypeVar("T")


@dataclass
class Settings:
    """Settings that every benchmark has; each adds its own in a subclass."""

    repeats: int = 5
    """Measurements of each side, at least 5 for a number to publish."""
    threads: int | None = None
    """Threads of torch; null takes the fastest number, measured at the start."""
    results_dir: str = str(RESULTS)
    """Where the record goes."""

    def __post_init__(self) -> None:
        """Refuse a measurement of nothing."""
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")


@dataclass
class ModelSettings(Settings):
    """Settings of a benchmark that runs a live model."""

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"


def open_model(settings: ModelSettings) -> ElasticLLM:
    """Set torch's threads and load the model.

    Raises:
        RapError: The model cannot be loaded.
    """
    from rap_env.llm.device import use_threads  # these load torch
    from rap_env.llm.loading import load_llm

    use_threads(settings.threads or "auto")
    return load_llm(settings.model, device=settings.device, dtype=settings.dtype)


def settings_from_cli(schema: type[T]) -> T:
    """The settings of a benchmark with the command line's ``key=value`` put in.

    Args:
        schema: A dataclass whose fields all have defaults.

    A misspelt key or a value of the wrong type ends the program with one sentence, exit code 2.
    """
    try:
        given = OmegaConf.from_cli(sys.argv[1:])
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        made: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, RapError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(schema))  # type: ignore[arg-type]
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        sys.stderr.write(f"Error: {reason}. Settings are given as key=value; known are {known}.\n")
        sys.exit(_EXIT_CODE)
    settings: T = made
    return settings


def launch(schema: type[T], run: Callable[[T], object]) -> None:
    """Run a benchmark with the command line's settings; a mistake ends it with one sentence.

    Args:
        schema: As for `settings_from_cli`.
        run: The benchmark.
    """
    settings = settings_from_cli(schema)
    try:
        run(settings)
    except RapError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(_EXIT_CODE)


def alternate(
    sides: Mapping[str, Callable[[], object]], repeats: int = 5, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn (A B A B ...), so that drift hits all alike.

    Args:
        sides: What to measure, by name. On CUDA the device is synchronised before and after.
        repeats: Measurements of each side.
        warm_up: Calls of each side beforehand that are not measured.
    """
    for _ in range(warm_up):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, and how many there are."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "repeats": len(values),
    }


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Spread of the paired ratios ``slow[i] / fast[i]``: above 1 where `fast` is faster."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


@dataclass(frozen=True)
class Target:
    """A number that a benchmark should reach.

    Attributes:
        what: What the number is, with its unit or what it is a ratio of.
        at_least: Lowest value that meets it, or None.
        at_most: Highest value that meets it, or None.
        reached: The median that was measured.
        against: What it is compared with.
        low: Lowest measurement, where there are several.
        high: Highest measurement.

    Raises:
        ValueError: It has no bound, so that nothing could miss it.
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
        """A target with a `spread` of measurements; the median decides.

        Args:
            what: As the attribute.
            measured: What `spread` or `ratios` gave.
            at_least: As the attribute.
            at_most: As the attribute.
            against: As the attribute.
        """
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
    """Write one benchmark's record as JSON and print it as a short table.

    Args:
        name: Name of the benchmark.
        device: Device that gave the numbers, such as ``"cpu"`` or ``"cuda:0"``.
        settings: A dataclass; the record goes to its `results_dir`, if it has one.
        targets: What should be reached.
        measured: All else that was measured; plain values, units in the names.
        notes: Sentences that explain the numbers, such as what bounds a missed target.

    Returns:
        The file, ``NAME-cpu.json`` or ``NAME-cuda.json``.
    """
    chosen = dataclasses.asdict(settings)
    folder = Path(chosen.pop("results_dir", RESULTS))
    record = {
        "benchmark": name,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
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


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that a call takes, until a CUDA device in use has done its work as well."""
    gc.collect()  # so that no side pays for what another one left
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - began


def _synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
