"""Settings of the study of calibration text, and of small models trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from experiments.config.common import (
    Count,
    CountOrZero,
    PinnedText,
    Section,
    TextConfig,
    among,
    distinct,
    within,
)
from experiments.errors import ExperimentError


@dataclass
class TextsConfig(Section):
    """Dependence of costs and plans on the calibration text."""

    section = "texts"
    kinds: dict[str, TextConfig] = field(default_factory=dict)
    """Kinds of text by name: their sources. Windows and seeds are those of this section."""
    seeds: Annotated[list[CountOrZero], distinct] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the calibration text: each gives a draw of every kind."""
    windows: Count = 1
    """Windows of the calibration text of a draw."""
    window_tokens: Annotated[int, within(2)] = 1024
    report_windows: Count = 8
    """Windows of each kind's report text."""
    cells: list[PinnedText] = field(default_factory=list)
    """Requests with budgets in bytes, as in ``evaluate.pinned``."""


@dataclass
class PromptsConfig(Section):
    """Policies that see the prompt, beside those that do not, on held-out text."""

    section = "prompts"
    policies: Annotated[list[str], distinct] = field(
        default_factory=lambda: ["knapsack", "knapsack-by-text"]
    )
    """Names or paths for `load_policy`; the others are compared with the first one."""
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Held-out texts by name: the report parts of files."""
    prompt_tokens: Count = 64
    """First tokens of a window that are the prompt."""
    cells: list[PinnedText] = field(default_factory=list)
    """Requests with budgets in bytes, as in ``evaluate.pinned``."""
    recorded: dict[str, str] = field(default_factory=dict)
    """Methods of earlier evaluations, such as uniform, with the folder of each: the plans that they
    chose for these requests and budgets."""


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
