"""Records of ``experiments.long_context``: results of tasks, and losses on documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.study.records import Record

TASKS_FILE, LOSSES_FILE = "tasks.jsonl", "losses.jsonl"
NATIVE = "native"
"""Name of the plan that all others are compared with."""
POSITIONS, ANSWERS = "positions", "answers"


class PlanRecord(Record):
    """A record of one plan at one length.

    The fields of every such record:

    Attributes:
        plan: Level of all caches, or a policy with its budget.
        length: Tokens of a text.
        levels: Levels of all items that are not native, as `CompressionPlan.of` takes them.
        peak_bytes: Peak bytes of the plan for a batch of sequences of this length.
        native_peak_bytes: The same of the native model.
        batch_size: Sequences of that batch.
    """

    plan: str
    length: int
    levels: dict[str, str]
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int

    rerun = "run experiments.long_context again"


@dataclass(frozen=True)
class TaskRow(PlanRecord):
    """The result of one plan on one task: a line of ``tasks.jsonl``; see `PlanRecord`.

    Attributes:
        kind: The kind of the task.
        questions: Number of questions.
        accuracy: Share of right answers.
        accuracy_ci_low: Lower end of its 95 % interval (Wilson), over independent questions.
        accuracy_ci_high: Upper end.
        chance: Accuracy of guessing.
        choice_nll: Mean NLL of the right choice among the choices, nats.
        right: For each question whether the answer is right.
        choice_nlls: For each question the NLL of its right choice among the choices.
        kinds: For each question where in the text its answer is.
    """

    plan: str
    kind: str
    length: int
    levels: dict[str, str]
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int
    questions: int
    accuracy: float
    accuracy_ci_low: float
    accuracy_ci_high: float
    chance: float
    choice_nll: float
    right: list[int]
    choice_nlls: list[float]
    kinds: list[str]

    record_name = "A result of a long-context task"
    identity = ("plan", "kind", "length")


@dataclass(frozen=True)
class LossRow(PlanRecord):
    """The loss of one plan on documents: a line of ``losses.jsonl``; see `PlanRecord`.

    Attributes:
        measure: ``positions``: the loss by position in a document; ``answers``: the loss of
            reference answers to questions about documents.
        nll: Mean over documents and tokens, nats per token.
        buckets: First and last position (exclusive) of each bucket; one bucket for answers.
        values: Mean NLL of each document and bucket, nats per token, (documents, buckets).
    """

    plan: str
    measure: str
    length: int
    levels: dict[str, str]
    peak_bytes: int
    native_peak_bytes: int
    batch_size: int
    nll: float
    buckets: list[list[int]]
    values: list[list[float]]

    record_name = "A loss over a long context"
    identity = ("plan", "measure", "length")

    @property
    def by_bucket(self) -> list[float]:
        """Mean NLL of each bucket over the documents."""
        return [float(value) for value in np.mean(self.values, axis=0)]
