"""What the studies beside the main comparison measure."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.common import TextConfig, at_least, parse_cell
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

SMALL_FAMILIES = ("uniform", "unequal")


def _check_lists(section: str, **lists: list[int]) -> None:
    """Refuse empty lists, repeated entries, and those below 1 (seeds: below 0).

    Raises:
        ExperimentError: One is.
    """
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ExperimentError(
                f"{section}.{name} needs entries, each of them once, not {values}."
            )
        at_least(section, 0 if name == "seeds" else 1, **{name: min(values)})


@dataclass
class StabilityConfig:
    """How much importance, order and policy depend on the calibration text."""

    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Calibration texts by name; each is drawn with every seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    top: list[int] = field(default_factory=lambda: [5, 10, 20])
    """First blocks of two orders that are compared."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.85", "8x2048@0.8"])
    """Requests and budgets at which the masks that orders give are judged."""
    agents: list[str] = field(default_factory=list)
    """Run folders of trained agents, which are shown the importance on each text."""

    def __post_init__(self) -> None:
        """Refuse cells, seeds and numbers of blocks that cannot be."""
        _check_lists("stability", seeds=self.seeds, top=self.top)
        _ = self.parsed_cells

    @property
    def parsed_cells(self) -> list[tuple[int, int, float]]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]


@dataclass
class TextStudyConfig:
    """How much the best mask depends on the kind of text."""

    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Kinds of text by name."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ share of the dense peak."""
    report_windows: int = 24
    """Windows of each kind's report text."""
    method: str = "greedy_per_byte"
    """How masks are searched: any baseline, or ``lazy_per_byte``, which measures less."""
    all_tokens: bool = True
    """Whether a shared mask is also searched on the whole text of all kinds, not only on as
    much as one kind has."""

    def __post_init__(self) -> None:
        """Refuse cells that cannot be."""
        at_least("text_study", 1, report_windows=self.report_windows)
        _ = self.parsed_cells

    @property
    def parsed_cells(self) -> list[tuple[int, int, float]]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]


@dataclass
class OverfittingConfig:
    """How far a search's loss on its calibration text is from that on text it never saw."""

    windows: list[int] = field(default_factory=lambda: [2, 8, 32, 128])
    """Sizes of the calibration text, in windows of ``calibration.window_tokens``."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the calibration text."""
    most_windows: int | None = None
    """A size is drawn with as many of the seeds as have at most so many windows together, and
    with one at least; null for all seeds."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.85", "8x2048@0.8"])
    """Requests and budgets: batch size x tokens @ share of the dense peak."""

    def __post_init__(self) -> None:
        """Refuse cells, seeds and sizes that cannot be."""
        _check_lists("overfitting", windows=self.windows, seeds=self.seeds)
        at_least("overfitting", 1, most_windows=self.most_windows)
        _ = self.parsed_cells

    @property
    def parsed_cells(self) -> list[tuple[int, int, float]]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]

    def seeds_of(self, windows: int) -> list[int]:
        """The seeds that a size is drawn with."""
        if self.most_windows is None:
            return self.seeds
        return self.seeds[: max(1, self.most_windows // windows)]


@dataclass
class SmallLMConfig:
    """A small language model that is trained on the spot, where costs or counts suit a study."""

    family: str = "uniform"
    """``uniform``: all blocks of a kind cost the same; ``unequal``: experts and sliding windows."""
    layers: int = 6
    hidden_size: int = 192
    heads: int = 4
    """Heads of attention, each with keys and values of its own."""
    ffn_size: int = 512
    """Inner width of a dense feed-forward block."""
    experts: int = 8
    """Experts of a mixture block (``unequal`` alone), two for each token and one that all share."""
    expert_size: int = 128
    """Inner width of one expert."""
    sliding_window_tokens: int = 64
    """Tokens that a sliding attention block (``unequal`` alone) looks back on, its own included."""
    max_positions: int = 2048
    """Longest sequence that it accepts, in tokens; it has learned from windows of the texts."""
    vocab_size: int = 2048
    """Most entries of its byte-level tokenizer, which is made of the same text."""
    steps: int = 1200
    """Updates of the weights."""
    batch_windows: int = 8
    """Windows of text in each update."""
    learning_rate: float = 2e-3
    texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to train on, by name: the calibration parts of files. Without any, ``writer`` writes."""
    writer: str = "smollm2-135m"
    """The language model that writes what has the source ``self``."""
    held_out_windows: int = 8
    """Windows of each text's selection part that the finished model is measured on."""
    path: str | None = None
    """Where the model folder goes; null for ``model`` in the run folder."""

    def __post_init__(self) -> None:
        """Refuse unknown families and sizes that cannot be."""
        if self.family not in SMALL_FAMILIES:
            raise UnknownNameError("small_lm.family", self.family, SMALL_FAMILIES)
        sizes = ("layers", "hidden_size", "heads", "ffn_size", "expert_size", "steps",
                 "batch_windows", "held_out_windows")  # fmt: skip
        at_least("small_lm", 1, **{name: getattr(self, name) for name in sizes})
        at_least("small_lm", 2, experts=self.experts, max_positions=self.max_positions,
                 sliding_window_tokens=self.sliding_window_tokens)  # fmt: skip
        at_least("small_lm", 258, vocab_size=self.vocab_size)  # 256 bytes, and start and end
        at_least("small_lm", 1e-8, learning_rate=self.learning_rate)
        if self.hidden_size % (2 * self.heads):
            raise ExperimentError(
                "small_lm.hidden_size must be an even number of values for each of "
                f"{self.heads} heads, not {self.hidden_size}."
            )
