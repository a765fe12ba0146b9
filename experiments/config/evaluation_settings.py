"""Settings of evaluations, reports, comparisons of runs, and exported policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING

from experiments.config.common import (
    CellText,
    Count,
    Fraction,
    Pinned,
    PinnedText,
    Section,
    ShapeText,
    TextConfig,
    among,
    parse_pinned,
    some,
)
from experiments.config.plain import TASKS, completed, defaults
from experiments.study.experiment_errors import ExperimentError

CALIBRATION = "calibration"
"""Value of a text setting that selects the calibration text."""
POLICY_SUFFIX = ".safetensors"


@dataclass
class EvaluateConfig(Section):
    """Requests and budgets of an evaluation, the methods, and the text to measure on."""

    section = "evaluate"
    requests: list[ShapeText] = field(default_factory=lambda: ["1x128"])
    """Batch size x sequence length in tokens."""
    budgets: list[Fraction] = field(default_factory=lambda: [0.9, 0.8])
    """Fractions of the dense model's peak bytes."""
    pinned: list[PinnedText] = field(default_factory=list)
    """Requests with budgets in bytes, such as 8x2048@101234567, beside `requests` x `budgets`;
    8x2048@101234567~0.5 also names the ΔNLL that the budget stands for."""
    sparsities: list[Fraction] = field(default_factory=list)
    """Fractions of all block bytes to free at least, at the request with the fewest tokens."""
    outside: list[CellText] = field(default_factory=list)
    """Cells outside the training range of policies, such as 8x8192@0.5."""
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this comparison, [] for none."""
    best_of: Annotated[list[Count], some] = field(default_factory=lambda: [1])
    """Number of masks that an agent samples before it takes the best by its scores; 1 uses no
    scores. The first entry is the agent's method; each other entry is a separate method."""
    baselines: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    """Earlier results (folders or files) whose plans are measured again, on this text and these
    tasks; nothing chooses plans then."""
    random_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    text: TextConfig = field(default_factory=lambda: TextConfig(source="self"))
    selection: TextConfig | None = field(
        default_factory=lambda: TextConfig(source=CALIBRATION)  # Hydra merges no dict into a null
    )
    """Text on which a sweep's objective is measured; ``calibration`` or null for that text."""
    tasks: dict[str, Any] = field(default_factory=partial(defaults, TASKS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = completed("tasks", self.tasks, TASKS)
        for name in ("requests", "budgets"):
            if not self.pinned:
                some(f"evaluate.{name}", getattr(self, name))

    @property
    def selection_text(self) -> TextConfig | None:
        """The text that a sweep's objective is measured on; None for the calibration text."""
        named = self.selection is None or self.selection.source == CALIBRATION
        return None if named else self.selection

    @property
    def pinned_cells(self) -> list[Pinned]:
        """The pinned cells, parsed."""
        return [parse_pinned(text) for text in self.pinned]


@dataclass
class CompareConfig(Section):
    """All settings of ``experiments.compare``."""

    runs: Any = "runs"
    """A folder or a list of folders; records are found at any depth."""
    format: Annotated[str, among("text", "markdown")] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = list(self.runs) if isinstance(self.runs, (list, tuple)) else [self.runs]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ExperimentError(
                f"runs is a folder or a list of folders, such as runs=[runs/main,runs/seeds], not "
                f"{self.runs!r}."
            )
        self.folders = [Path(name) for name in names]


@dataclass
class ExportPolicyConfig:
    """All settings of ``experiments.export_policy``."""

    run: str = MISSING
    """Folder of a training run, such as runs/learning/train/rap-s0."""
    out: str = MISSING
    """File to write; its name ends in .safetensors."""

    def __post_init__(self) -> None:
        if not self.out.endswith((POLICY_SUFFIX, MISSING)):  # `load_policy` goes by the suffix
            raise ExperimentError(
                f"out must end in {POLICY_SUFFIX}, such as rap{POLICY_SUFFIX}, not {self.out}."
            )
