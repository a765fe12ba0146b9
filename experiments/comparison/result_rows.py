"""Rows of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.config.common import Cell, Shape
from experiments.study.harness import DeltaNLLRecord
from experiments.study.json_records import record_files
from rap_env.plan import Plan

QUALITY = (
    "kl_divergence_mean",
    "kl_divergence_p99",
    "same_top_token_share",
    "flipped_answers_share",
    "accuracy_above_chance",
    "accuracy_above_chance_ci_low",
    "accuracy_above_chance_ci_high",
)
"""Fields of a row that compare its plan with the native model, besides ΔNLL."""


@dataclass(frozen=True, kw_only=True)
class ResultRow(DeltaNLLRecord):
    """Result of one method and seed at one cell: a line of ``results.jsonl``.

    Attributes:
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        budget_fraction: Budget as a fraction of the native model's peak bytes.
        budget_bytes: The budget itself.
        peak_bytes: Peak bytes of the plan under the request.
        method: Name of the baseline, or of the trained agent's run without its seed.
        seed: Seed of the agent or of the random baseline; None where nothing is drawn.
        fits: Whether the peak is within the budget.
        calibration_delta_nll: ΔNLL on the calibration text, which methods may have used.
        accuracies: Accuracy of each task in [0, 1]; empty without tasks.
        decision_s: Seconds from the request to the plan.
        evaluations: Plans scored by the model for this request.
        setup_evaluations: Plans scored once, before any request.
        training_s: Seconds of training; None if not recorded.
        levels: Levels of all items that are not native, by name.
        target_delta_nll: ΔNLL that the cell's budget stands for, nats per token, if for any.
        accuracies_norm: lm-eval's ``acc_norm`` of the tasks that have it, as `accuracies` is
            ``acc``; None without tasks, as `task_documents`.
        task_documents: Number of documents of each task.
        kl_divergence_mean: Mean over the tokens of the report text of the KL divergence of
            the next-token distribution from the native model's, nats; None if not measured,
            as all that follow.
        kl_divergence_p99: Its 99th percentile over tokens, nats.
        same_top_token_share: Share of tokens for which the native model has the same top
            token.
        flipped_answers_share: Share of the tasks' multiple-choice answers that are right
            where the native model's are wrong, or wrong where they are right; None without
            such tasks.
        accuracy_above_chance: Share of the native accuracy above chance that is kept, mean
            over the tasks in which the native model is above chance; None without such tasks.
        accuracy_above_chance_ci_low: Lower end of its 95 % interval over documents.
        accuracy_above_chance_ci_high: Upper end.
    """

    request: dict[str, int]
    budget_fraction: float
    budget_bytes: int
    peak_bytes: int
    method: str
    seed: int | None
    fits: bool
    calibration_delta_nll: float
    accuracies: dict[str, float]
    decision_s: float
    evaluations: int
    setup_evaluations: int
    levels: dict[str, str]
    training_s: float | None = None
    target_delta_nll: float | None = None
    accuracies_norm: dict[str, float] | None = None
    task_documents: dict[str, int] | None = None
    kl_divergence_mean: float | None = None
    kl_divergence_p99: float | None = None
    same_top_token_share: float | None = None
    flipped_answers_share: float | None = None
    accuracy_above_chance: float | None = None
    accuracy_above_chance_ci_low: float | None = None
    accuracy_above_chance_ci_high: float | None = None

    file = "results.jsonl"
    record_name = "A result record"
    identity = ("method", "seed", "cell")

    @property
    def shape(self) -> Shape:
        """Batch size and sequence length in tokens."""
        return self.request["batch_size"], self.request["seq_len_tokens"]

    @property
    def cell(self) -> Cell:
        """Batch size, sequence length in tokens and budget fraction."""
        return (*self.shape, self.budget_fraction)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return Plan.of(self.levels)

    @property
    def quality(self) -> dict[str, float]:
        """The measured ones of `QUALITY`, by name."""
        values = {name: getattr(self, name) for name in QUALITY}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def mean_accuracy(self) -> float | None:
        """Mean accuracy over tasks; None without tasks."""
        if not self.accuracies:
            return None
        return sum(self.accuracies.values()) / len(self.accuracies)


def rows_below(folder: Path) -> list[ResultRow]:
    """Read all rows of the ``results.jsonl`` at any depth below a folder."""
    return [row for path in record_files(folder, ResultRow.file) for row in ResultRow.read(path)]
