"""Rows of the study of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.study.records import Record

ALL = "all"
"""Plans from the mean of the costs over all kinds."""
CALIBRATION = "calibration"
"""Name of the calibration text itself, as a text that plans are judged on."""


class Draw(NamedTuple):
    """A calibration text: a kind (`ALL` for all of them), a seed, and the tokens of each kind."""

    kind: str
    seed: int
    tokens: int


@dataclass(frozen=True)
class CostRow(Record):
    """One-shot costs of all items on one draw; `costs` has the fields of `LevelCosts`."""

    file = "costs.jsonl"
    record_name = "A row of costs"
    identity = ("kind", "seed", "tokens")

    kind: str
    seed: int
    tokens: int
    costs: dict[str, Any]

    @property
    def draw(self) -> Draw:
        """The text."""
        return Draw(self.kind, self.seed, self.tokens)


@dataclass(frozen=True)
class PlanRow(Record):
    """The knapsack's plan for one cell from the costs on one draw, measured on one text.

    Attributes:
        chosen_on: Kind of the draw, `seed` and `tokens` likewise.
        cell: The request and its budget in bytes, as in ``texts.cells``.
        judged_on: Kind of the report text; `CALIBRATION` for the text of the draw itself.
        window_losses: ΔNLL of each window of the text, nats per token, (windows,).
    """

    file = "plans.jsonl"
    record_name = "A row of a plan"
    identity = ("chosen_on", "seed", "tokens", "cell", "judged_on")

    chosen_on: str
    seed: int
    tokens: int
    cell: str
    judged_on: str
    window_losses: list[float]


@dataclass(frozen=True)
class PromptRow(Record):
    """Plans by the prompts' kinds of text for one cell, measured on one text.

    Attributes:
        known: Whether the kind of the text is among those that the policy knows.
        prompt_tokens: First tokens of each window that are its prompt.
        shares: Shares of the kinds that the policy knows in the prompt of each window.
        window_losses: ΔNLL of each window with the plan for its prompt, nats per token, (windows,).
        general_losses: The same with the plan for equal shares of those kinds.
    """

    file = "prompts.jsonl"
    record_name = "A row of plans by prompts"
    identity = ("seed", "cell", "judged_on", "known")

    seed: int
    cell: str
    judged_on: str
    known: bool
    prompt_tokens: int
    shares: list[list[float]]
    window_losses: list[float]
    general_losses: list[float]
