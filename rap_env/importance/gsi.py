"""Greedy sequential importance: remove the least important block, measure all others again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rap_env.artifacts import save_artifact
from rap_env.blocks import Block, BlockMask
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.provenance import load_profile, provenance_of
from rap_env.memory import HasFacts
from rap_env.scoring.scorer import MaskScorer, ticker

METHODS = ("exact",)
_KIND, _FORMAT = "GSI profile", 1


@dataclass(frozen=True)
class GSIProfile:
    """The result of GSI (RAP, arXiv 2505.17138, Algorithm 1) on one model and text.

    Attributes:
        method: ``"exact"``: every remaining block is measured in every round.
        num_blocks: 2L.
        param_bytes: Bytes of each block's weights, length 2L.
        order_indices: Blocks in the order of their removal; may stop before all are gone.
        dense_nll: NLL of the dense model, nats per token.
        nll_after: NLL after each removal, nats per token.
        first_nll: NLL without each block alone, length 2L (the first round).
        last_nll: In the last round, NLL without each block that was then left in place, by
            name (measured before that round's removal).
        evaluations: Masks that had to be known for it, stored ones included: what it costs
            to whoever starts with nothing.
        evaluations_run: Masks that were really run; less where a store already had some.
        block_forwards: Blocks that were really run.
        seconds: Wall time it took, over all of its sessions, for what was really run.
        provenance: Model, text and everything else that determined the scores.
    """

    method: str
    num_blocks: int
    param_bytes: tuple[int, ...]
    order_indices: tuple[int, ...]
    dense_nll: float
    nll_after: tuple[float, ...]
    first_nll: tuple[float, ...]
    last_nll: dict[str, float]
    evaluations: int
    evaluations_run: int
    block_forwards: int
    seconds: float
    provenance: dict[str, Any]

    @property
    def order(self) -> tuple[Block, ...]:
        """Blocks in the order of their removal, least important first."""
        return tuple(Block(index, self.param_bytes[index]) for index in self.order_indices)

    @property
    def first_pass(self) -> npt.NDArray[np.float64]:
        """Rise in NLL if one block is removed from the dense model, nats per token, (2L,)."""
        return np.array(self.first_nll) - self.dense_nll

    @property
    def full_order(self) -> tuple[int, ...]:
        """All blocks: the measured order, then the rest by their last measured loss."""
        rest = set(range(self.num_blocks)) - set(self.order_indices)
        return (*self.order_indices, *sorted(rest, key=lambda i: (self.marginal_loss[i], i)))

    @property
    def rank(self) -> npt.NDArray[np.float64]:
        """Place of each block in the full order, 0 = removed first, 1 = last, (2L,)."""
        rank = np.empty(self.num_blocks)
        rank[list(self.full_order)] = np.linspace(0, 1, self.num_blocks)
        return rank

    @property
    def marginal_loss(self) -> npt.NDArray[np.float64]:
        """Rise in NLL at each block's removal, nats per token, (2L,).

        For blocks that the order leaves: the rise in the place of the last removal.
        """
        levels = np.array([self.dense_nll, *self.nll_after])
        loss = self.first_pass
        for name, nll in self.last_nll.items():
            loss[list(BlockMask.of(name))] = nll - levels[-2]
        loss[list(self.order_indices)] = np.diff(levels)
        return loss

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact."""
        save_artifact(path, _KIND, _FORMAT, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> GSIProfile:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or of another model.
        """
        return cls(**load_profile(path, _KIND, _FORMAT, model))


def gsi(
    scorer: MaskScorer,
    *,
    method: Literal["exact"] = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GSIProfile:
    """Find the order in which blocks are missed least.

    Args:
        scorer: Measures masks on the calibration text.
        method: ``"exact"`` measures every remaining block in every round.
        stop: Removals after which to stop; None goes on until no block is left.
        path: Where the artifact is kept. It is written after each removal, and a profile of
            the same model and text that is already there is gone on with.
        progress: Whether to draw a progress bar.

    Returns:
        The profile, with at least `stop` removals.

    Raises:
        UnknownNameError: An unknown method.
        ArtifactError: What lies at `path` is damaged, or of another model or text.
    """
    if method not in METHODS:
        raise UnknownNameError("GSI method", method, METHODS)
    rounds = scorer.llm.facts.num_blocks if stop is None else min(stop, scorer.llm.facts.num_blocks)
    profile = _started(scorer, method, path)
    total = sum(profile.num_blocks - i for i in range(len(profile.order_indices), rounds))
    with tqdm(
        total=total, desc="GSI", unit="mask", leave=False, disable=None if progress else True
    ) as bar:
        while len(profile.order_indices) < rounds:
            profile = _next_round(scorer, profile, ticker(bar))
            bar.set_postfix_str(
                f"{len(profile.order_indices)} removed, "
                f"loss {profile.nll_after[-1] - profile.dense_nll:.3f}"
            )
            if path is not None:
                profile.save(path)
    return profile


def _started(scorer: MaskScorer, method: str, path: str | os.PathLike[str] | None) -> GSIProfile:
    """An empty profile, or the one that lies at `path`."""
    facts = scorer.llm.facts
    if path is not None and Path(path).exists():
        found = GSIProfile.load(path, scorer.llm)
        if found.provenance["scoring"] != dict(scorer.context):
            raise ArtifactError(
                f"{os.fspath(path)} was measured on other text or in another way "
                f"({found.provenance['text']}); give another path or delete it."
            )
        return found
    before, dense_nll = scorer.evaluations, scorer.dense_nll
    return GSIProfile(
        method=method,
        num_blocks=facts.num_blocks,
        param_bytes=facts.block_param_bytes,
        order_indices=(),
        dense_nll=dense_nll,
        nll_after=(),
        first_nll=(),
        last_nll={},
        evaluations=1,  # the dense model
        evaluations_run=scorer.evaluations - before,
        block_forwards=0,
        seconds=0.0,
        provenance=provenance_of(scorer),
    )


def _next_round(
    scorer: MaskScorer, profile: GSIProfile, on_score: Callable[[BlockMask], None]
) -> GSIProfile:
    """Measure what is left, and remove the block that is missed least (the first of equals)."""
    began = time.perf_counter()
    before = scorer.evaluations, scorer.block_forwards
    nll = scorer.scan(BlockMask.of(*profile.order_indices), on_score)
    least = min(nll, key=lambda block: (nll[block], block.index))
    return replace(
        profile,
        order_indices=(*profile.order_indices, least.index),
        nll_after=(*profile.nll_after, nll[least]),
        first_nll=profile.first_nll or tuple(nll[block] for block in scorer.llm.blocks),
        last_nll={block.name: value for block, value in nll.items() if block != least},
        evaluations=profile.evaluations + len(nll),
        evaluations_run=profile.evaluations_run + scorer.evaluations - before[0],
        block_forwards=profile.block_forwards + scorer.block_forwards - before[1],
        seconds=profile.seconds + time.perf_counter() - began,
    )
