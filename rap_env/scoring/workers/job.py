"""What a scorer and its workers exchange: texts, and what was measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rap_env.plan import MaskOrPlan


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """A text and how it is scored: what a worker needs to make the scorer that the driver has.

    Attributes:
        tokens: Token ids, int64, shape (windows, T).
        options: Further arguments of `MaskScorer`.
        context: `MaskScorer.context` of the driver; a worker's must be equal.
    """

    tokens: npt.NDArray[np.int64]
    options: Mapping[str, Any]
    context: Mapping[str, Any]

    def same_as(self, other: ScoringJob | None) -> bool:
        """Whether another job has the same text (by its hash), options and context."""
        return other is not None and (self.options, self.context) == (other.options, other.context)


@dataclass(frozen=True)
class Measured:
    """What a worker measured.

    Attributes:
        plans: The masks and plans of the batch.
        window_nll: By mask or plan: NLL of each window, nats per token, shape (windows,). A search
            leaves out those that it dropped.
        lower_bounds: Lower bounds of the NLL of those, nats per token.
        block_runs: Blocks that the model ran, as `PlanRunner.block_runs` counts them.
    """

    plans: Sequence[MaskOrPlan]
    window_nll: Mapping[MaskOrPlan, npt.NDArray[np.float64]]
    lower_bounds: Mapping[MaskOrPlan, float]
    block_runs: int


class Workers(Protocol):
    """Workers that hold the model of a scorer; `rap_env.scoring.workers.pool.WorkerPool` is one."""

    def measure(
        self, job: ScoringJob, plans: Sequence[MaskOrPlan], least: int, /
    ) -> Iterator[Measured]:
        """Score masks and plans, in batches of at least some."""

    def search(
        self, job: ScoringJob, plans: Sequence[MaskOrPlan], near: MaskOrPlan | None, /
    ) -> Iterator[Measured]:
        """Find the best of some masks or plans, as `find_best_mask` does."""
