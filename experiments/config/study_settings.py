"""Settings of the studies: texts and prompts, the ladder, long contexts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from experiments.config.common import (
    Count,
    CountOrZero,
    Fraction,
    PinnedText,
    Section,
    ShapeText,
    TextConfig,
    among,
    distinct,
    form,
    some,
    within,
)
from experiments.config.plain import Setting, completed
from experiments.llama_cpp import CACHE_TYPES, FILE_KINDS
from rap_env.errors import check_name
from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.scoring.long_context_tasks import LEAST_TOKENS, LONG_CONTEXT_KINDS


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
class LadderConfig(Section):
    """What the studies ``ladder`` and ``equal_bytes`` compare on ``evaluate.text``."""

    section = "ladder"
    requests: Annotated[list[ShapeText], some] = field(
        default_factory=lambda: ["1x128", "4x512", "8x2048", "16x4096"]
    )
    """Batch size x sequence length in tokens."""
    weights: list[Annotated[str, among(*WEIGHT_LEVELS[:-1])]] = field(
        default_factory=lambda: ["native", "int8", "int4"]
    )
    """Levels of all weights in uniform settings."""
    caches: list[Annotated[str, form(CacheLevel.of)]] = field(
        default_factory=lambda: ["native", "int8", "int4", "int2", "window512"]
    )
    """Levels of all caches in uniform settings."""
    removing_policy: str | None = "frontier"
    """Policy that only removes blocks: a baseline, or what `rap_env.load_policy` takes; null for
    none."""
    removal_budgets: list[Fraction] = field(default_factory=lambda: [0.95, 0.9, 0.8, 0.7, 0.6])
    """Its budgets, as fractions of the unquantised model's peak bytes."""
    knapsack: str | None = "knapsack"
    """Policy over the levels of all items: what `rap_env.load_policy` takes; null for none."""
    budgets: list[Fraction] = field(
        default_factory=lambda: [0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2]
    )
    """Its budgets."""
    llama_cpp_caches: list[Annotated[str, among(*CACHE_TYPES)]] = field(default_factory=list)
    """Formats of llama.cpp's cache; weights are those of the file."""
    llama_cpp_files: list[Annotated[str, among(*FILE_KINDS)]] = field(default_factory=list)
    """Kinds of files that ``experiments.studies.equal_bytes`` makes with llama.cpp's quantiser."""


LENGTHS = {"lengths": Setting(list, [512, 1024, 2048]), "questions": Setting(int, 32, within(1))}
"""Settings of a kind of generated task."""


@dataclass
class LongContextConfig(Section):
    """What ``experiments.studies.long_context`` compares, and on what."""

    section = "long_context"
    caches: list[Annotated[str, form(CacheLevel.of)]] = field(
        default_factory=lambda: ["native", "int4", "int2", "window512", "int4-window512"]
    )
    """Levels of all caches in uniform settings; ``native`` is always measured."""
    policies: list[str] = field(default_factory=lambda: ["knapsack"])
    """Baselines, and what `rap_env.load_policy` takes: names and files."""
    budgets: list[Fraction] = field(default_factory=lambda: [0.4, 0.25])
    """Budgets of policies, as fractions of the native model's peak bytes."""
    batch_size: Count = 16
    """Sequences of the requests that policies answer; the length is that of each task."""
    tasks: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {kind: {} for kind in LONG_CONTEXT_KINDS}
    )
    """Generated tasks by kind: the ``lengths`` of their texts in tokens, and the number of
    ``questions`` at each length; a text has 3 to 12 of them."""
    documents: list[TextConfig] = field(default_factory=list)
    """Documents for the loss, of JSONL files: `windows` of those with at least `window_tokens`
    tokens, cut to these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, given in self.tasks.items():
            check_name("kind of long_context.tasks", kind, LONG_CONTEXT_KINDS)
            task = self.tasks[kind] = completed(f"long_context.tasks.{kind}", given, LENGTHS)
            for tokens in task["lengths"]:
                within(LEAST_TOKENS)(f"long_context.tasks.{kind}.lengths", tokens)
