"""What the studies beside the main comparison measure."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.parts import TextConfig, at_least, parse_cell


@dataclass
class StabilityConfig:
    """How much importance, order and policy depend on the calibration text."""

    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Calibration texts by name; each is drawn with every seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    top: list[int] = field(default_factory=lambda: [5, 10, 20])
    """First blocks of two orders that are compared."""


@dataclass
class TextStudyConfig:
    """How much the best mask depends on the kind of text."""

    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Kinds of text by name."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ share of the dense peak."""
    report_windows: int = 24
    """Windows of each kind's report text."""

    def __post_init__(self) -> None:
        """Refuse cells that cannot be."""
        at_least("text_study", 1, report_windows=self.report_windows)
        for text in self.cells:
            parse_cell(text)


@dataclass
class SmallLMConfig:
    """A small language model that is trained on the spot, where costs or counts suit a study."""

    family: str = "uniform"
    """``uniform``: all blocks of a kind cost the same; ``unequal``: experts and sliding windows."""
    layers: int = 6
    hidden_size: int = 128
    steps: int = 1500
    batch_windows: int = 16
    window_tokens: int = 128
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to train on, by name."""
