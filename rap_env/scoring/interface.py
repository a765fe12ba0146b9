"""The interface of everything that scores masks and plans: a live model's scorer, a table's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rap_env.blocks import Block
from rap_env.plan import MaskOrPlan

OnScore = Callable[[Any], object]
"""Called with each mask or plan after it was scored, as `rap_env.plan.simplest` gives it."""


def notify(on_score: OnScore | None, plans: Sequence[MaskOrPlan]) -> None:
    """Call `on_score`, if there is one, for each mask or plan."""
    if on_score is not None:
        for plan in plans:
            on_score(plan)


class Scorer(Protocol):
    """Gives the NLL of masks and plans on one text.

    `rap_env.scoring.scorer.MaskScorer` measures it with a live model;
    `rap_env.scoring.score_table.TableScorer` reads it from a score table.
    """

    @property
    def context(self) -> Mapping[str, Any]:
        """Everything that determines a score: model, dtype, text, device, versions."""

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""

    @property
    def known(self) -> int:
        """Number of masks and plans asked for so far, including stored ones."""

    @property
    def evaluations(self) -> int:
        """Number of plans that were run through the model; stored scores do not count."""

    @property
    def passes(self) -> float:
        """As `evaluations`, but one run on a part of the text counts as that part."""

    @property
    def block_forwards(self) -> float:
        """Blocks that the model ran, in passes over the whole text; parts count by their share."""

    @property
    def num_windows(self) -> int:
        """Number of windows of the text."""

    @property
    def evaluation_s(self) -> float:
        """Seconds that one pass over the text takes."""

    def is_predicted(self, plan: MaskOrPlan, /) -> bool:
        """Whether the score of a plan is a prediction rather than a measurement."""

    def nll(self, plan: MaskOrPlan, /) -> float:
        """Mean NLL of the text under a mask or plan, nats per token.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """

    def nll_many(
        self, plans: Sequence[MaskOrPlan], /, on_score: OnScore | None = None
    ) -> list[float]:
        """NLL of several masks or plans, in their order; `on_score` is called after each one."""

    def nll_on(self, plans: Sequence[MaskOrPlan], windows: Sequence[int], /) -> list[float]:
        """NLL of several masks or plans on some windows of the text only, nats per token."""

    def scan(self, plan: MaskOrPlan, /, on_score: OnScore | None = None) -> dict[Block, float]:
        """For every block that a mask or plan keeps: the NLL if that block is removed too."""
