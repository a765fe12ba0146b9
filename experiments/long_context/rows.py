"""Rows of ``experiments.long_context``: results of tasks, and losses on documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.study.records import Record
from experiments.study.statistics import Estimate, wilson_interval
from rap_env.scoring.long_context_tasks import LONG_CONTEXT_KINDS

NATIVE = "native"
"""Name of the plan that all others are compared with."""
POSITIONS, ANSWERS = "positions", "answers"


@dataclass(frozen=True, kw_only=True)
class PlanRow(Record):
    """A row of one plan at one length.

    Attributes:
        plan: Level of all caches, or a policy with its budget.
        measure: What was measured.
        length: Tokens of a text.
        peak_bytes: Peak bytes of the plan for a batch of sequences of this length.
        native_peak_bytes: The same of the native model.
        batch_size: Sequences of that batch.
    """

    rerun = "run experiments.long_context again"
    identity = ("plan", "measure", "length")

    plan: str
    measure: str
    length: int
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int


@dataclass(frozen=True)
class TaskRow(PlanRow):
    """The result of one plan on one task; `measure` is its kind.

    Attributes:
        chance: Accuracy of guessing.
        right: For each question whether the answer is right.
        kinds: For each question where in the text its answer is.
    """

    file = "tasks.jsonl"
    record_name = "A result of a long-context task"

    chance: float
    right: list[int]
    kinds: list[str]

    @property
    def share(self) -> Estimate:
        """Share of right answers, with a 95 % interval (Wilson) over independent questions."""
        return share_of(self.right)


@dataclass(frozen=True)
class LossRow(PlanRow):
    """The loss of one plan on documents.

    `measure` is ``positions`` for the loss by position in a document, ``answers`` for the loss of
    reference answers to questions about documents.

    Attributes:
        buckets: First and last position (exclusive) of each bucket; one bucket for answers.
        values: Mean NLL of each document and bucket, nats per token, (documents, buckets).
    """

    file = "losses.jsonl"
    record_name = "A loss over a long context"

    buckets: list[list[int]]
    values: list[list[float]]

    @property
    def by_bucket(self) -> list[float]:
        """Mean NLL of each bucket over the documents."""
        return [float(value) for value in np.mean(self.values, axis=0)]

    @property
    def nll(self) -> float:
        """Mean over documents and tokens, nats per token."""
        sizes = [high - max(low, 1) for low, high in self.buckets]  # the first is not predicted
        return float(np.average(self.by_bucket, weights=sizes))


def share_of(right: Sequence[int]) -> Estimate:
    """Share of right answers, with a 95 % interval (Wilson) over independent questions."""
    share = sum(right) / len(right)
    return Estimate(share, *wilson_interval(share, len(right)))


class Curves:
    """All rows, by plan, measure and length."""

    def __init__(self, rows: Sequence[PlanRow]) -> None:
        self.tasks = [row for row in rows if isinstance(row, TaskRow)]
        self.losses = [row for row in rows if isinstance(row, LossRow)]
        self._tasks = {(row.plan, row.measure, row.length): row for row in self.tasks}
        self._losses = {(row.plan, row.measure, row.length): row for row in self.losses}

    @cached_property
    def plans(self) -> list[str]:
        """Names of the plans, the native one first."""
        return list(dict.fromkeys(row.plan for row in [*self.tasks, *self.losses]))

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of tasks that there are rows of."""
        measured = {row.measure for row in self.tasks}
        return [kind for kind in LONG_CONTEXT_KINDS if kind in measured]

    def lengths(self, measure: str) -> list[int]:
        """Lengths at which a kind of task or a loss was measured."""
        rows = [*self.tasks, *self.losses]
        return sorted({row.length for row in rows if row.measure == measure})

    def task(self, plan: str, kind: str, length: int) -> TaskRow | None:
        """The row of a plan on a task."""
        return self._tasks.get((plan, kind, length))

    def loss(self, plan: str, measure: str, length: int) -> LossRow | None:
        """The row of a plan's loss."""
        return self._losses.get((plan, measure, length))

    def facts(self, plan: str, length: int | None = None) -> list[TaskRow]:
        """Rows of a plan on tasks that ask for facts, at one length or at the long ones."""
        lengths = self.long if length is None else [length]
        rows = [row for row in self.tasks if row.plan == plan and row.measure != "counting"]
        return [row for row in rows if row.length in lengths]

    @cached_property
    def long(self) -> list[int]:
        """Lengths from 1,024 tokens that all tasks about facts have, or all if there are none."""
        by_kind = [set(self.lengths(kind)) for kind in self.kinds if kind != "counting"]
        lengths = sorted(set.intersection(*by_kind) or set.union(*by_kind)) if by_kind else []
        return [length for length in lengths if length >= 1024] or lengths

    def compared_length(self, measure: str) -> int | None:
        """The greatest of the lengths at which a loss has most documents; None without any."""
        rows = [row for row in self.losses if (row.plan, row.measure) == (NATIVE, measure)]
        longest = max(rows, key=lambda row: (len(row.values), row.length), default=None)
        return None if longest is None else longest.length
