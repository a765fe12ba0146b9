"""Settings of ``experiments.long_context``: plans, lengths, tasks and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from experiments.config.common import Count, Fraction, Section, TextConfig, distinct, form, within
from rap_env.errors import check_name
from rap_env.levels import CacheLevel
from rap_env.scoring.long_context_tasks import LEAST_TOKENS, LONG_CONTEXT_KINDS


@dataclass
class TaskLengths(Section):
    """A kind of generated task, with the lengths of its texts."""

    section = "long_context.tasks"
    lengths: Annotated[list[Annotated[int, within(LEAST_TOKENS)]], distinct] = field(
        default_factory=lambda: [512, 1024, 2048]
    )
    """Tokens of a text with its questions."""
    questions: Count = 32
    """Questions at each length; a text has 3 to 12 of them."""


@dataclass
class AnswersConfig(Section):
    """Questions about documents: the likelihood of reference answers."""

    section = "long_context.answers"
    data_root: str | None = None
    """Folder with local files of tasks; null for no such questions."""
    task: str = "longbench_qmsum"
    """Folder in it with a file test.jsonl, whose rows have context, question and answers."""
    lengths: Annotated[list[Annotated[int, within(256)]], distinct] = field(
        default_factory=lambda: [1024, 2048]
    )
    """Tokens to which documents are cut, with question and answer."""
    questions: Count = 8
    """Number of first questions."""


@dataclass
class LongContextConfig(Section):
    """What ``experiments.long_context`` compares, and on what."""

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
    tasks: dict[str, TaskLengths] = field(
        default_factory=lambda: {kind: TaskLengths() for kind in LONG_CONTEXT_KINDS}
    )
    """Generated tasks by kind."""
    positions: list[TextConfig] = field(default_factory=list)
    """Documents for the loss by position: those of a JSONL file that are long enough, or written by
    the model (``self``). `windows` is their number, `window_tokens` what they are cut to."""
    bucket_tokens: Count = 512
    """Positions whose loss is averaged."""
    answers: AnswersConfig = field(default_factory=AnswersConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.tasks:
            check_name("kind of long_context.tasks", kind, LONG_CONTEXT_KINDS)
