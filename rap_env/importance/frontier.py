"""The frontier: the best known mask for each pair (attn blocks removed, ffn blocks removed).

The delta_nll of a mask does not depend on the request: the request only sets the bytes that each
block costs. If all blocks of a kind cost the same, feasibility depends on two counts, so a table
of the best known mask for each pair of counts answers any request by a lookup.

Frontiers are saved and loaded without torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from rap_env.artifacts import save_artifact
from rap_env.costs import request_costs
from rap_env.importance.profiles import load_profile
from rap_env.memory import MemoryModel
from rap_env.model_facts import HasFacts
from rap_env.plan import Plan
from rap_env.request import Request

_FORMAT = 2

Counts = tuple[int, int]
"""Numbers of attn and ffn blocks removed."""


@dataclass(frozen=True)
class Frontier:
    """The best known masks of one model on one text, as `build_frontier` found them.

    Attributes:
        num_blocks: 2L.
        dense_nll: NLL of the dense model, nats per token.
        scores: NLL of every mask that was scored, nats per token.
        evaluations_run: Masks that the model ran; fewer if a store already had some.
        seconds: Wall time of the search.
        settings: Settings of the search, and the number of requests it was built for.
        provenance: Model, text and everything else that determined the scores.
    """

    KIND: ClassVar[str] = "frontier"

    num_blocks: int
    dense_nll: float
    scores: dict[Plan, float]
    evaluations_run: int
    seconds: float
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Masks that were scored to build it: the cost without a store."""
        return len(self.scores)

    @cached_property
    def entries(self) -> tuple[tuple[Plan, float], ...]:
        """The best mask of each pair of counts with its delta_nll, nats per token; least first."""
        best = best_by_counts(self.scores)
        found = [(mask, self.scores[mask] - self.dense_nll) for mask in best.values()]
        return tuple(sorted(found, key=lambda entry: (entry[1], len(entry[0].removed))))

    def best(self, memory: MemoryModel, request: Request) -> Plan | None:
        """The mask of least delta_nll that fits the request; None if no entry fits.

        Raises:
            InvalidRequestError: The model does not support the batch size or the length.
        """
        memory.check(request.batch_size, request.seq_len_tokens)
        costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
        for mask, _ in self.entries:
            if costs.peak_bytes(mask.removed) <= request.budget_bytes:
                return mask
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact."""
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        del body["scores"]
        body["masks"] = [mask.removed_names for mask in self.scores]
        body["nll"] = list(self.scores.values())
        save_artifact(path, self.KIND, _FORMAT, body)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Frontier:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, of another model, or of one with other stubs.
        """
        body = load_profile(path, cls.KIND, _FORMAT, model)
        masks = (Plan.removing(*names) for names in body.pop("masks"))
        scores = dict(zip(masks, body.pop("nll"), strict=True))
        return cls(scores=scores, **body)


def best_by_counts(nll: Mapping[Plan, float]) -> dict[Counts, Plan]:
    """The mask of the least NLL for each pair of counts."""
    found: dict[Counts, Plan] = {}
    for mask in nll:
        pair = mask.count_removed("attn"), mask.count_removed("ffn")
        if pair not in found or nll[mask] < nll[found[pair]]:
            found[pair] = mask
    return found
