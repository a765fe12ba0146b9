"""Settings of evaluations, reports and comparisons of runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.common import (
    Cell,
    TasksConfig,
    TextConfig,
    at_least,
    one_of,
    parse_cell,
    parse_shape,
    self_written,
)
from experiments.errors import ExperimentError

CALIBRATION = "calibration"
"""Names the calibration text where another text could stand."""
FORMATS = ("text", "json", "markdown")


@dataclass
class EvaluateConfig:
    """Requests and budgets of an evaluation, the methods, and the text to measure on."""

    requests: list[str] = field(default_factory=lambda: ["1x128"])
    """Batch size x sequence length in tokens."""
    budgets: list[float] = field(default_factory=lambda: [0.9, 0.8])
    """Fractions of the dense model's peak bytes."""
    sparsities: list[float] = field(default_factory=list)
    """Fractions of all block bytes to free at least, at the request with the fewest tokens."""
    outside: list[str] = field(default_factory=list)
    """Cells outside the training range of policies, such as 8x8192@0.5."""
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this comparison, [] for none."""
    best_of: list[int] = field(default_factory=lambda: [1])
    """Number of masks that an agent samples before it takes the best by its scores; 1 uses no
    scores. The first entry is the agent's method; each other entry is a method of its own."""
    baselines: list[str] = field(default_factory=list)
    random_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    text: TextConfig = field(default_factory=self_written)
    selection: TextConfig | None = field(
        default_factory=lambda: TextConfig(source=CALIBRATION)  # Hydra merges no dict into a null
    )
    """Text on which a sweep's objective is measured; ``calibration`` or null for that text."""
    tasks: TasksConfig = field(default_factory=TasksConfig)

    @property
    def selection_text(self) -> TextConfig | None:
        """The text that a sweep's objective is measured on; None for the calibration text."""
        named = self.selection is None or self.selection.source == CALIBRATION
        return None if named else self.selection

    def __post_init__(self) -> None:
        if not self.requests or not self.budgets:
            raise ExperimentError("evaluate.requests and evaluate.budgets need an entry each.")
        for name, whole in (("budgets", "the dense peak"), ("sparsities", "all blocks' bytes")):
            for share in getattr(self, name):
                if not 0 < share <= 1:
                    raise ExperimentError(
                        f"evaluate.{name} are fractions of {whole}, above 0 and at most 1; "
                        f"{share} is not."
                    )
        if not self.best_of:
            raise ExperimentError("evaluate.best_of needs an entry, such as [1].")
        for count in self.best_of:
            at_least("evaluate", 1, best_of=count)
        _ = self.shapes, self.outside_cells

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The requests as (batch size, sequence length in tokens)."""
        return [parse_shape(text) for text in self.requests]

    @property
    def outside_cells(self) -> list[Cell]:
        """The cells outside the training range, parsed."""
        return [parse_cell(text) for text in self.outside]


@dataclass
class ReportConfig:
    """Text of the report."""

    title: str = "Runtime-adaptive pruning: report"


@dataclass
class CompareConfig:
    """All settings of ``experiments.compare``."""

    runs: Any = "runs"
    """A folder or a list of folders; records are found at any depth."""
    format: str = "text"
    """Output format: ``text``, ``json`` or ``markdown``."""

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        if not self.folders or not all(isinstance(name, str) and name for name in self._names):
            raise ExperimentError(
                f"runs is a folder or a list of folders, such as runs=[runs/main,runs/seeds], not "
                f"{self.runs!r}."
            )

    @property
    def folders(self) -> list[Path]:
        """The folders to search."""
        return [Path(str(name)) for name in self._names]

    @property
    def _names(self) -> list[Any]:
        return list(self.runs) if isinstance(self.runs, (list, tuple)) else [self.runs]
