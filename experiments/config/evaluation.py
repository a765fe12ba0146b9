"""The grid that methods are compared on, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.parts import TasksConfig, TextConfig, parse_shape, self_written
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
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this experiment, [] for none."""
    baselines: list[str] = field(default_factory=list)
    random_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    text: TextConfig = field(default_factory=self_written)
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        """Refuse an empty grid and budgets that are no fraction."""
        if not self.requests or not self.budgets:
            raise ExperimentError("evaluate.requests and evaluate.budgets need an entry each.")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ExperimentError(
                    f"evaluate.budgets are fractions of the dense peak, above 0 and at most 1; "
                    f"{budget} is not."
                )
        _ = self.shapes

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The requests as (batch size, sequence length in tokens)."""
        return [parse_shape(text) for text in self.requests]


@dataclass
class ReportConfig:
    """Words on the report."""

    title: str = "Runtime-adaptive pruning: report"


@dataclass
class CompareConfig:
    """Which run folders ``experiments.compare`` reads, and how it prints."""

    runs: list[str] = field(default_factory=list)
    """Folders with records, read to any depth; empty for this experiment's own."""
    format: str = "text"
    """``text`` for people, ``json`` for programs, ``markdown``."""

    def __post_init__(self) -> None:
        """Refuse unknown formats."""
        if self.format not in FORMATS:
            raise UnknownNameError("compare.format", self.format, FORMATS)
