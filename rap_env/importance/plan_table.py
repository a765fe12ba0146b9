"""The best known plans: every measured plan of one model on one text, looked up by request.

The ΔNLL of a plan does not depend on the request: the request only sets the bytes that each
item costs. So a table of measured plans answers any request by a lookup. Of plans that only
remove blocks, the best one for each pair of counts (attn blocks removed, ffn blocks removed)
is enough where all blocks of a kind need the same bytes. Files are read without torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import digest, save_artifact
from rap_env.errors import UnknownNameError
from rap_env.importance.profiles import load_profile
from rap_env.ladder.items import Ladder
from rap_env.ladder.state import LadderCosts
from rap_env.memory import HasFacts
from rap_env.plan import Plan

_FORMAT = 1
_PLANS_AT_ONCE = 400


@dataclass(frozen=True, eq=False)
class PlanTable:
    """Measured plans of one model on one text.

    Attributes:
        num_layers: L.
        dense_nll: NLL of the native model, nats per token.
        scores: NLL of every measured plan, nats per token.
        evaluations_run: Plans that the model ran; fewer if a store already had some.
        seconds: Wall time of the search.
        settings: Settings of the search.
        provenance: Model, text and everything else that determined the scores.
    """

    KIND: ClassVar[str] = "plan table"

    num_layers: int
    dense_nll: float
    scores: dict[Plan, float]
    evaluations_run: int
    seconds: float
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Plans that were measured to build it: the cost without a store."""
        return len(self.scores)

    @property
    def sha256(self) -> str:
        """Hash of all plans and their scores, in hex."""
        return digest([[plan.to_json(), nll] for plan, nll in self.scores.items()])

    def on(self, ladder: Ladder) -> KnownPlans:
        """The plans that a ladder has, for lookups."""
        return KnownPlans.of(ladder, self.scores, self.dense_nll)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked, compressed JSON artifact."""
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        del body["scores"]
        body["plans"] = [plan.levels for plan in self.scores]
        body["nll"] = list(self.scores.values())
        save_artifact(path, self.KIND, _FORMAT, body, compress=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or of another model.
        """
        body = load_profile(path, cls.KIND, _FORMAT, model)
        plans = map(Plan.of, body.pop("plans"))
        return cls(scores=dict(zip(plans, body.pop("nll"), strict=True)), **body)


@dataclass(frozen=True, eq=False)
class KnownPlans:
    """Measured plans of one ladder, from the least ΔNLL up.

    Attributes:
        plans: The plans, (n,).
        delta_nll: Their ΔNLL, nats per token, (n,).
        positions: The position of each item's level in each plan, (n, items).
    """

    plans: tuple[Plan, ...]
    delta_nll: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ladder: Ladder, scores: Mapping[Plan, float], native_nll: float) -> Self:
        """Measured plans; those with levels that the ladder does not have are left out.

        Args:
            ladder: The items.
            scores: NLL of plans, nats per token.
            native_nll: NLL of the native model, nats per token.
        """
        entries: list[tuple[float, Plan, list[int]]] = []
        for plan, nll in scores.items():
            try:
                entries.append((nll - native_nll, plan, ladder.positions(plan)))
            except UnknownNameError:
                continue
        entries.sort(key=lambda entry: entry[0])
        positions = np.array([row for *_, row in entries], dtype=np.int64)
        return cls(
            tuple(plan for _, plan, _ in entries),
            np.array([rise for rise, *_ in entries]),
            positions.reshape(len(entries), len(ladder)),
        )

    def reached(self, ladder: Ladder) -> KnownPlans:
        """The plans that actions reach although caches take some levels together."""
        kept = ladder.reaches(self.positions)
        plans = tuple(itertools.compress(self.plans, kept))
        return KnownPlans(plans, self.delta_nll[kept], self.positions[kept])

    def peak_bytes(self, costs: LadderCosts) -> npt.NDArray[np.int64]:
        """Peak bytes of each plan under a request, (n,)."""
        return costs.peaks(self.positions)

    def best(self, costs: LadderCosts, budget_bytes: int) -> Plan | None:
        """The plan of least ΔNLL that fits a budget, None if none does."""
        for first in range(0, len(self.plans), _PLANS_AT_ONCE):  # the best plans come first
            peaks = costs.peaks(self.positions[first : first + _PLANS_AT_ONCE])
            fitting = np.flatnonzero(peaks <= budget_bytes)
            if len(fitting):
                return self.plans[first + int(fitting[0])]
        return None
