"""The interfaces of what scores plans: a live model's scorer, a table's, workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from rap_env.plan import Plan

if TYPE_CHECKING:
    from tqdm import tqdm

OnScore = Callable[[Any], object]
"""Called with each plan after it was scored."""


def notify(on_score: OnScore | None, plans: Sequence[Plan]) -> None:
    """Call `on_score`, if there is one, for each plan."""
    if on_score is not None:
        for plan in plans:
            on_score(plan)


def bar_callback(bar: tqdm[Any]) -> OnScore:
    """A callback for `Scorer.nll_many` that advances a progress bar."""
    return lambda _plan: bar.update()


class Scorer(Protocol):
    """Gives the NLL of plans on one text.

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
        """Number of plans asked for so far, including stored ones."""

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

    def is_predicted(self, plan: Plan, /) -> bool:
        """Whether the score of a plan is a prediction rather than a measurement."""

    def nll(self, plan: Plan, /) -> float:
        """Mean NLL of the text under a plan, nats per token.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """

    def nll_many(self, plans: Sequence[Plan], /, on_score: OnScore | None = None) -> list[float]:
        """NLL of several plans, in their order; `on_score` is called after each one."""

    def nll_on(self, plans: Sequence[Plan], windows: Sequence[int], /) -> list[float]:
        """NLL of several plans on some windows of the text only, nats per token."""


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """A text and how it is scored: what a worker needs to make the scorer that the driver has.

    Attributes:
        tokens: Token ids, int64, shape (windows, T).
        options: Further arguments of `MaskScorer`.
        context: `MaskScorer.context` of the driver; a worker's must be equal.
        search: Whether to find the best of some plans, instead of measuring all.
        near: As in `find_best_mask`.
        compare: Whether plans are also compared with the native model.
    """

    tokens: npt.NDArray[np.int64]
    options: Mapping[str, Any]
    context: Mapping[str, Any]
    search: bool = False
    near: Plan | None = None
    compare: bool = False


@dataclass(frozen=True)
class NativeAgreement:
    """How close the next-token distributions of a plan are to the native model's on a text.

    Attributes:
        kl_divergence_mean: Mean over the text's tokens of the KL divergence from the native
            model, the sum over the vocabulary of p log(p / q) with the native probabilities p
            and the plan's q, nats.
        kl_divergence_p99: Its 99th percentile over tokens, nats.
        same_top_token_share: Share of tokens for which both rate the same token highest.
    """

    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float


@dataclass(frozen=True)
class Measured:
    """What a worker measured.

    Attributes:
        plans: The plans of the batch.
        window_nll: By plan: NLL of each window, nats per token, shape (windows,). A search
            leaves out those that it dropped.
        lower_bounds: Lower bounds of the NLL of those, nats per token.
        block_runs: Blocks that the model ran, as `PlanRunner.block_runs` counts them.
        agreements: By plan: its agreement with the native model, if the job asks for it.
    """

    plans: Sequence[Plan]
    window_nll: Mapping[Plan, npt.NDArray[np.float64]]
    lower_bounds: Mapping[Plan, float]
    block_runs: int
    agreements: Mapping[Plan, NativeAgreement] = field(default_factory=dict)
