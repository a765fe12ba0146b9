"""Settings of the studies, and of small models trained for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from experiments.config.common import (
    CellText,
    Count,
    CountOrZero,
    HasCells,
    Section,
    TextConfig,
    among,
    distinct,
    within,
)
from experiments.errors import ExperimentError


@dataclass
class StabilityConfig(Section, HasCells):
    """Dependence of importance, removal order and policy on the calibration text."""

    section = "stability"
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Calibration texts by name; each is drawn with every seed."""
    seeds: Annotated[list[CountOrZero], distinct] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    top: Annotated[list[Count], distinct] = field(default_factory=lambda: [5, 10, 20])
    """Lengths of the prefixes of two orders that are compared."""
    cells: list[CellText] = field(default_factory=lambda: ["1x128@0.85", "8x2048@0.8"])
    """Requests and budgets at which the masks of the orders are evaluated."""
    agents: list[str] = field(default_factory=list)
    """Run folders of trained agents, which observe the importance measured on each text."""


@dataclass
class TextStudyConfig(Section, HasCells):
    """Dependence of the best mask on the kind of text."""

    section = "text_study"
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Kinds of text by name."""
    cells: list[CellText] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ fraction of the dense peak."""
    report_windows: Count = 24
    """Windows of each kind's report text."""
    method: str = "greedy_per_byte"
    """Search method: any baseline, or ``lazy_per_byte``, which needs fewer evaluations."""
    all_tokens: bool = True
    """Whether to also search a shared mask on the whole text of all kinds, besides the one
    searched on as many tokens as one kind has."""


@dataclass
class OverfittingConfig(Section, HasCells):
    """Difference between ΔNLL on the calibration text and on held-out text."""

    section = "overfitting"
    windows: Annotated[list[Count], distinct] = field(default_factory=lambda: [2, 8, 32, 128])
    """Sizes of the calibration text, in windows of ``calibration.window_tokens``."""
    seeds: Annotated[list[CountOrZero], distinct] = field(default_factory=lambda: [0])
    """Seeds of the calibration text."""
    most_windows: Count | None = None
    """Limit on the windows that all seeds of one size have together: larger sizes are drawn with
    fewer seeds, at least one. null for all seeds."""
    cells: list[CellText] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.85", "8x2048@0.8"])
    """Requests and budgets: batch size x tokens @ fraction of the dense peak."""

    def seeds_of(self, windows: int) -> list[int]:
        """Return the seeds that a size is drawn with."""
        if self.most_windows is None:
            return self.seeds
        return self.seeds[: max(1, self.most_windows // windows)]


@dataclass
class SmallModelConfig(Section):
    """A small language model that ``experiments.small_models`` trains from scratch."""

    section = "small_models"
    family: Annotated[str, among("uniform", "unequal")] = "uniform"
    """``uniform``: all blocks of a kind have the same cost; ``unequal``: some layers have experts
    or sliding windows."""
    layers: Count = 6
    hidden_size: Count = 192
    heads: Count = 4
    """Attention heads, each with its own keys and values."""
    ffn_size: Count = 512
    """Inner width of a dense feed-forward block."""
    experts: Annotated[int, within(2)] = 8
    """Experts of a mixture block (``unequal`` only): two for each token and one shared by all."""
    expert_size: Count = 128
    """Inner width of one expert."""
    sliding_window_tokens: Annotated[int, within(2)] = 64
    """Tokens that a sliding attention block attends to (``unequal`` only), its own included."""
    max_positions: Annotated[int, within(2)] = 2048
    """Longest sequence that the model accepts, in tokens; it is trained on shorter windows."""
    vocab_size: Annotated[int, within(258)] = 2048  # 256 bytes, start and end
    """Maximum size of its byte-level vocabulary, which is trained on the same text."""
    steps: Count = 1200
    """Updates of the weights."""
    batch_windows: Count = 8
    """Windows of text in each update."""
    learning_rate: Annotated[float, within(1e-8)] = 2e-3
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Training texts by name: the calibration parts of files. If empty, ``writer`` writes."""
    writer: str = "smollm2-135m"
    """Language model that writes texts with the source ``self``."""
    held_out_windows: Count = 8
    """Windows of each text's selection part on which the trained model is measured."""
    path: str | None = None
    """Output folder of the model; null for ``model`` in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.heads):
            raise ExperimentError(
                "small_models.hidden_size must be an even number of values for each of "
                f"{self.heads} heads, not {self.hidden_size}."
            )
