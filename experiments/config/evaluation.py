"""The cells that methods are compared on, the report, and what compares whole runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.common import (
    TasksConfig,
    TextConfig,
    at_least,
    parse_cell,
    parse_shape,
    self_written,
)
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

FORMATS = ("text", "json", "markdown")


@dataclass
class EvaluateConfig:
    """The grid, who is compared on it, and on what."""

    requests: list[str] = field(default_factory=lambda: ["1x128"])
    """Batch size x sequence length in tokens."""
    budgets: list[float] = field(default_factory=lambda: [0.9, 0.8])
    """Fractions of the dense model's peak bytes."""
    sparsities: list[float] = field(default_factory=list)
    """Shares of the bytes of all blocks to be freed at least, at the request with fewest tokens."""
    outside: list[str] = field(default_factory=list)
    """Cells outside the range that policies are trained on, such as 8x8192@0.5."""
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this experiment, [] for none."""
    best_of: list[int] = field(default_factory=lambda: [1])
    """Masks that each agent proposes, of which the best by its scores is taken; 1 scores none. The
    first is the agents' usual way; others are methods of their own."""
    baselines: list[str] = field(default_factory=list)
    random_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    text: TextConfig = field(default_factory=self_written)
    selection: TextConfig | None = None
    """Text on which a training's policy is judged for a sweep; null for the calibration text."""
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        """Refuse an empty grid and budgets that are no fraction."""
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
            raise ExperimentError("evaluate.best_of needs an entry; [1] is the policy as it is.")
        for count in self.best_of:
            at_least("evaluate", 1, best_of=count)
        _ = self.shapes, self.outside_cells

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The requests as (batch size, sequence length in tokens)."""
        return [parse_shape(text) for text in self.requests]

    @property
    def outside_cells(self) -> list[tuple[int, int, float]]:
        """Cells outside the training range: batch size, length in tokens, budget fraction."""
        return [parse_cell(text) for text in self.outside]


@dataclass
class ReportConfig:
    """Words on the report."""

    title: str = "Runtime-adaptive pruning: report"


@dataclass
class CompareConfig:
    """All settings of ``experiments.compare``: what it reads, and how it prints."""

    runs: Any = "runs"
    """A folder, or a list of them, that is searched for records to any depth."""
    format: str = "text"
    """``text`` for people, ``json`` for programs, ``markdown``."""

    def __post_init__(self) -> None:
        """Refuse unknown formats and what is no folder's name."""
        if self.format not in FORMATS:
            raise UnknownNameError("format", self.format, FORMATS)
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
