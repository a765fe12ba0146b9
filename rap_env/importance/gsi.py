"""Greedy sequential importance: remove the least important block, measure all others again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rap_env.artifacts import save_artifact
from rap_env.blocks import Block, BlockMask, block_index, block_name
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.provenance import load_profile, provenance_of
from rap_env.importance.rounds import METHODS, Rounds, Standing
from rap_env.memory import HasFacts
from rap_env.scoring.scorer import MaskScorer, ticker

_KIND, _FORMAT = "GSI profile", 2


@dataclass(frozen=True)
class GSIProfile:
    """The result of GSI (RAP, arXiv 2505.17138, Algorithm 1) on one model and text.

    Attributes:
        method: ``"exact"``, ``"lazy"`` or ``"halving"``, see `gsi`.
        num_blocks: 2L.
        param_bytes: Bytes of each block's weights, length 2L.
        order_indices: Blocks in the order of their removal; may stop before all are gone.
        dense_nll: NLL of the dense model, nats per token.
        nll_after: NLL after each removal, nats per token.
        first_nll: NLL without each block alone, length 2L (the first round).
        left_loss: By the name of each block that is left: the rise in NLL that its removal
            was last known to add to that of the blocks removed by then.
        candidates: Blocks that were looked at in each round.
        evaluations: Masks that were looked at for it, stored ones included: what it costs
            to whoever starts with nothing.
        evaluations_run: Masks that were really run, many of them not to the end; less where a
            store already had some.
        block_forwards: Blocks that were really run on the whole text; on a part of it, that part.
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
    left_loss: dict[str, float]
    candidates: tuple[int, ...]
    evaluations: int
    evaluations_run: int
    block_forwards: float
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

        For blocks that the order leaves: the rise in the place of the last removal that
        they were looked at for; after an exact search, the last one.
        """
        levels = np.array([self.dense_nll, *self.nll_after])
        loss = self.first_pass
        for name, rise in self.left_loss.items():
            loss[block_index(name)] = rise
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
            ArtifactError: It is truncated, altered, of another model, or of one with other stubs.
        """
        return cls(**load_profile(path, _KIND, _FORMAT, model))


def gsi(
    scorer: MaskScorer,
    *,
    method: str = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GSIProfile:
    """Find the order in which blocks are missed least.

    Args:
        scorer: Measures masks on the calibration text.
        method: ``"exact"`` finds the block of the least NLL in every round, dropping candidates
            as soon as they cannot be it: the order of the naive loop. ``"lazy"`` measures again
            only the candidates of the least last known losses, and more where one surprises.
            ``"halving"`` races eight of them, most on a quarter of the text. Both are several
            times quicker, and may miss a block that an exact search finds.
        stop: Removals after which to stop; None goes on until no block is left.
        path: Where the artifact is kept. It is written after each removal, and a profile of
            the same model and text that is already there is gone on with (``"halving"`` then
            has forgotten what single parts of the text said, so it may go another way).
        progress: Whether to draw a progress bar.

    Returns:
        The profile, with at least `stop` removals.

    Raises:
        UnknownNameError: An unknown method.
        ArtifactError: What lies at `path` is damaged, or of another model or text.
    """
    with tqdm(desc="GSI", unit="mask", leave=False, disable=None if progress else True) as bar:
        for profile in gsi_rounds(
            scorer, method=method, stop=stop, path=path, on_score=ticker(bar)
        ):
            removed = len(profile.order_indices)
            left = range(profile.num_blocks, 0, -1)  # candidates of each round
            bar.total = sum(left[: _rounds(scorer, stop)])
            bar.update(sum(left[:removed]) - bar.n)  # those that were not looked at, too
            rise = (profile.dense_nll, *profile.nll_after)[-1] - profile.dense_nll
            bar.set_postfix_str(f"{removed} removed, loss {rise:.3f}")
    return profile


def gsi_rounds(
    scorer: MaskScorer,
    *,
    method: str = "exact",
    stop: int | None = None,
    path: str | os.PathLike[str] | None = None,
    on_score: Callable[[BlockMask], None] = lambda _: None,
) -> Iterator[GSIProfile]:
    """As `gsi`, but gives the profile at the start and after each removal.

    Args:
        scorer: As for `gsi`, like `method`, `stop`, `path` and the errors.
        method: As for `gsi`.
        stop: As for `gsi`.
        path: As for `gsi`.
        on_score: Called after each mask that was looked at.
    """
    if method not in METHODS:
        raise UnknownNameError("GSI method", method, METHODS)
    profile = _started(scorer, method, path)
    ways, rounds = METHODS[method](scorer), _rounds(scorer, stop)
    yield profile
    while len(profile.order_indices) < rounds:
        profile = _next_round(ways, profile, rounds, on_score)
        if path is not None:
            profile.save(path)
        yield profile


def _rounds(scorer: MaskScorer, stop: int | None) -> int:
    """Removals that are asked for."""
    return min(scorer.llm.facts.num_blocks, scorer.llm.facts.num_blocks if stop is None else stop)


def _started(scorer: MaskScorer, method: str, path: str | os.PathLike[str] | None) -> GSIProfile:
    """An empty profile, or the one that lies at `path`."""
    facts = scorer.llm.facts
    if path is not None and Path(path).exists():
        found = GSIProfile.load(path, scorer.llm)
        if found.method != method:
            raise ArtifactError(
                f"{os.fspath(path)} was measured with method={found.method!r}, not {method!r}; "
                "give another path or delete it."
            )
        if found.provenance["scoring"] != dict(scorer.context):
            raise ArtifactError(
                f"{os.fspath(path)} was measured on other text or in another way "
                f"({found.provenance['text']}); give another path or delete it."
            )
        return found
    before = scorer.evaluations, scorer.block_forwards
    dense_nll = scorer.dense_nll
    return GSIProfile(
        method=method,
        num_blocks=facts.num_blocks,
        param_bytes=facts.block_param_bytes,
        order_indices=(),
        dense_nll=dense_nll,
        nll_after=(),
        first_nll=(),
        left_loss={},
        candidates=(),
        evaluations=1,  # the dense model
        evaluations_run=scorer.evaluations - before[0],
        block_forwards=scorer.block_forwards - before[1],
        seconds=0.0,
        provenance=provenance_of(scorer),
    )


def _next_round(
    ways: Rounds, profile: GSIProfile, rounds: int, tick: Callable[[BlockMask], None]
) -> GSIProfile:
    """Remove the block that is missed least."""
    began = time.perf_counter()
    before = ways.evaluations, ways.block_forwards
    done = len(profile.order_indices)
    known = {block_index(name): loss for name, loss in profile.left_loss.items()}
    levels = [profile.dense_nll, *profile.nll_after]
    found = ways.next(
        Standing(profile.order_indices, levels[-1], known, last=done + 1 == rounds), tick
    )
    known |= found.losses
    if not done:
        first = tuple(profile.dense_nll + known[i] for i in range(profile.num_blocks))
        profile = replace(profile, first_nll=first)
    return replace(
        profile,
        order_indices=(*profile.order_indices, found.block),
        nll_after=(*profile.nll_after, found.nll),
        left_loss={block_name(i): loss for i, loss in known.items() if i != found.block},
        candidates=(*profile.candidates, len(found.losses)),
        evaluations=profile.evaluations + len(found.losses),
        evaluations_run=profile.evaluations_run + ways.evaluations - before[0],
        block_forwards=profile.block_forwards + ways.block_forwards - before[1],
        seconds=profile.seconds + time.perf_counter() - began,
    )
