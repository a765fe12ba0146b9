"""The frontier: the best known mask for each pair (attn blocks removed, ffn blocks removed).

The loss of a mask does not depend on the request: the request sets only what each block costs in
bytes. Where all blocks of a kind cost the same, what fits depends on two counts, so a table of
the best known mask for each pair of counts answers any request by a look-up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rap_env.artifacts import save_artifact
from rap_env.blocks import BlockMask
from rap_env.costs import request_costs
from rap_env.importance.provenance import load_profile
from rap_env.memory import HasFacts, MemoryModel
from rap_env.request import Request
from rap_env.scoring.store import mask_of

_KIND, _FORMAT = "frontier", 1

Counts = tuple[int, int]
"""Attn and ffn blocks removed."""


@dataclass(frozen=True)
class Frontier:
    """The best known masks of one model on one text, as `build_frontier` found them.

    Attributes:
        num_blocks: 2L.
        dense_nll: NLL of the dense model, nats per token.
        scored: NLL of every mask that was scored, nats per token, by its indices as text.
        evaluations_run: Masks that were really run; less where a store already had some.
        seconds: Wall time of what was really run.
        settings: Those of the search, and how many requests it was built for.
        provenance: Model, text and everything else that determined the scores.
    """

    num_blocks: int
    dense_nll: float
    scored: dict[str, float]
    evaluations_run: int
    seconds: float
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Masks that were scored to build it: what it costs to whoever starts with nothing."""
        return len(self.scored)

    @cached_property
    def scores(self) -> dict[BlockMask, float]:
        """NLL of every mask that was scored, nats per token."""
        return {mask_of(key): nll for key, nll in self.scored.items()}

    @cached_property
    def entries(self) -> tuple[tuple[BlockMask, float], ...]:
        """The best mask of each pair of counts and its loss, nats per token; least loss first."""
        best = best_by_counts(self.scores)
        found = [(mask, self.scores[mask] - self.dense_nll) for mask in best.values()]
        return tuple(sorted(found, key=lambda entry: (entry[1], len(entry[0]))))

    def best(self, memory: MemoryModel, request: Request) -> BlockMask | None:
        """The entry of least loss that fits the request; None if no mask at all does.

        Raises:
            InvalidRequestError: The batch or the length does not suit the model.
        """
        memory.check(request.batch_size, request.seq_len_tokens)
        costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
        for mask, _ in self.entries:
            if costs.peak_bytes(mask.indices) <= request.budget_bytes:
                return mask
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact."""
        save_artifact(path, _KIND, _FORMAT, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Frontier:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, of another model, or of one with other stubs.
        """
        return cls(**load_profile(path, _KIND, _FORMAT, model))


def best_by_counts(nll: Mapping[BlockMask, float]) -> dict[Counts, BlockMask]:
    """The mask of the least NLL for each pair of counts."""
    found: dict[Counts, BlockMask] = {}
    for mask in nll:
        pair = mask.count("attn"), mask.count("ffn")
        if pair not in found or nll[mask] < nll[found[pair]]:
            found[pair] = mask
    return found
