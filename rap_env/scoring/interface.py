"""What scorers, their callers and workers exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """A text and how it is scored: what a worker needs to make the scorer that the driver has.

    Attributes:
        tokens: Token ids, int64, shape (windows, T).
        options: Further arguments of `PlanScorer`.
        context: `PlanScorer.context` of the driver; a worker's must be equal.
        compare: Whether plans are also compared with the native model.
    """

    tokens: npt.NDArray[np.int64]
    options: Mapping[str, Any]
    context: Mapping[str, Any]
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
        window_nll: By plan: NLL of each window, nats per token, shape (windows,).
        block_runs: Blocks that the model ran, as `PlanRunner.block_runs` counts them.
        agreements: By plan: its agreement with the native model, if the job asks for it.
    """

    plans: Sequence[Plan]
    window_nll: Mapping[Plan, npt.NDArray[np.float64]]
    block_runs: int
    agreements: Mapping[Plan, NativeAgreement] = field(default_factory=dict)
