"""A trained policy at decision time: a mask for a request, in passes of a small network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy

from agents.baselines.base import MaskChoice
from agents.checkpoint import checkpoint_of
from agents.errors import AgentConfigError
from agents.observing import MaskObserver, as_tensors
from agents.policies import action_scores
from agents.transfer import fitting_policy
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.observation import ObservationBuilder
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.observation import ImportanceFeatures

ScoreMasks = Callable[[Sequence[BlockMask]], Sequence[float]]
"""Gives a number for each mask, the less the better: its loss, or its NLL."""

_Q_TEMPERATURE = 0.25
"""Of sampling by Q values, in units of their spread over the blocks of an observation."""


class SeesBlocks(Protocol):
    """The part of `rap_env.context.PruningContext` that a trained policy needs: no scorer."""

    @property
    def memory(self) -> MemoryModel:
        """Byte arithmetic of the model."""

    @property
    def features(self) -> ImportanceFeatures:
        """What was measured of each block once."""


class RealScorer(Protocol):
    """The part of `rap_env.scoring.MaskScorer` that judging masks needs."""

    @property
    def evaluations(self) -> int:
        """Number of masks that were run through the model."""

    @property
    def block_forwards(self) -> float:
        """Blocks that were run on the whole text; on a part of it, that part."""

    @property
    def evaluation_s(self) -> float:
        """Seconds of one pass over the text."""

    def nll_many(self, masks: Sequence[BlockMask]) -> list[float]:
        """NLL of several masks, nats per token."""


class TrainedPolicy:
    """Chooses masks with a trained network, whatever agent it was trained with.

    It removes the block that the network likes best, again and again, until the request fits.
    Blocks that are already gone are never considered, also for agents that were trained
    without masks. With `best_of` above 1 it also samples masks from the network, all of them
    side by side, and takes the one that `score_masks` likes best.

    Args:
        policy: The network.
        builder: Makes its observations.
        best_of: Masks among which it chooses: the one above and samples.
        score_masks: Judges them by predictions; needed for more than one, or `scorer` is.
        scorer: Judges them by real scores instead: each mask is then an evaluation of the
            choice, counted and timed as those of a baseline.
        seed: Seed of the samples; a request is always given the same ones.

    Raises:
        AgentConfigError: There are several masks and nothing to judge them by, or none.
    """

    name = "rap"
    kv_aware = True

    def __init__(
        self,
        policy: BasePolicy,
        builder: ObservationBuilder,
        *,
        best_of: int = 1,
        score_masks: ScoreMasks | None = None,
        scorer: RealScorer | None = None,
        seed: int = 0,
    ) -> None:
        self._policy = policy
        self._policy.set_training_mode(False)
        self._builder = builder
        self._best_of = best_of
        self._score_masks = score_masks
        self._scorer = scorer
        self._seed = seed
        _check_best_of(best_of, judged=score_masks is not None or scorer is not None)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        context: SeesBlocks,
        *,
        best_of: int = 1,
        score_masks: ScoreMasks | None = None,
        scorer: RealScorer | None = None,
        seed: int = 0,
    ) -> TrainedPolicy:
        """The policy of the newest whole checkpoint in a run's folder; else as the class.

        A block-wise policy also serves a model with another number of layers, unless its
        blocks have vectors.

        Raises:
            ArtifactError: There is no checkpoint, all are damaged, or the policy was trained
                on a model of another shape.
            AgentConfigError: As for the class.
        """
        checkpoint = checkpoint_of(run_dir)
        builder = ObservationBuilder(context.memory, context.features)
        return cls(
            fitting_policy(checkpoint, builder),
            builder,
            best_of=best_of,
            score_masks=score_masks,
            scorer=scorer,
            seed=seed,
        )

    def select(
        self,
        request: Request,
        best_of: int | None = None,
        score_masks: ScoreMasks | None = None,
    ) -> MaskChoice:
        """Choose the blocks to remove for `request`.

        Args:
            request: What is to be served.
            best_of: As for the class; None for what it was given.
            score_masks: Predictions to judge by, instead of what the class was given.

        Raises:
            InvalidRequestError: The batch or the length does not suit the model.
            InfeasibleBudgetError: No mask at all fits the budget.
            AgentConfigError: As for the class.
        """
        count = self._best_of if best_of is None else best_of
        predicted = score_masks or self._score_masks
        real = self._scorer if predicted is None else None
        _check_best_of(count, judged=predicted is not None or real is not None)
        memory = self._builder.memory
        memory.check(request.batch_size, request.seq_len_tokens)
        memory.check_feasible(request)
        start = time.perf_counter()
        masks = list(dict.fromkeys(self.sample(request, count)))
        if len(masks) > 1 and real is not None:
            return _best_by_real_scores(masks, real, start)
        best = masks[0] if len(masks) == 1 or predicted is None else _least(masks, predicted)
        return MaskChoice(best, 0, 0, time.perf_counter() - start)

    @torch.inference_mode()
    def sample(self, request: Request, count: int) -> list[BlockMask]:
        """Masks under which `request` fits: the network's favourite, then `count` - 1 samples.

        All of them grow together, a block in each pass of the network.
        """
        observer = MaskObserver(self._builder, [request])
        removed = np.zeros((count, self._builder.memory.facts.num_blocks), dtype=bool)
        which = np.zeros(count, dtype=np.int64)
        generator = torch.Generator().manual_seed(self._seed)
        grows = np.flatnonzero(observer.over_bytes(which, removed))
        while len(grows):
            seen = as_tensors(observer.observe(which[grows], removed[grows]))
            liked = self._liked(seen)
            noise = torch.rand((count, liked.shape[1]), generator=generator)
            gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))  # argmax = a sample
            gumbel[0] = 0.0
            chosen = (liked + gumbel[torch.from_numpy(grows)]).argmax(dim=1)
            removed[grows, chosen.numpy()] = True
            grows = grows[observer.over_bytes(which[grows], removed[grows]) > 0]
        return [BlockMask(frozenset(np.flatnonzero(row).tolist())) for row in removed]

    def _liked(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the next block, minus infinity for those that are gone, (B, 2L)."""
        scores = action_scores(self._policy, observation)
        kept = observation["action_mask"] > 0
        if isinstance(self._policy, DQNPolicy):  # values, not logits: they have no scale
            count = kept.sum(dim=1, keepdim=True)
            centred = scores - (scores * kept).sum(dim=1, keepdim=True) / count
            spread = (centred.square() * kept).sum(dim=1, keepdim=True).div(count).sqrt()
            scores = centred / (_Q_TEMPERATURE * spread + 1e-8)
        return scores.masked_fill(~kept, -torch.inf)


def _least(masks: Sequence[BlockMask], score: ScoreMasks) -> BlockMask:
    """The mask with the least score; the first of several, and never one that is NaN."""
    scores = np.nan_to_num(np.asarray(score(masks), dtype=np.float64), nan=np.inf)
    return masks[int(np.argmin(scores))]


def _best_by_real_scores(
    masks: Sequence[BlockMask], scorer: RealScorer, start: float
) -> MaskChoice:
    """The best mask and what it cost; scores kept from before cost what they once did."""
    ran, forwards = scorer.evaluations, scorer.block_forwards
    best = _least(masks, scorer.nll_many)
    stored = len(masks) - (scorer.evaluations - ran)
    return MaskChoice(
        mask=best,
        evaluations=len(masks),
        block_forwards=scorer.block_forwards - forwards,
        decision_s=time.perf_counter() - start + max(0, stored) * scorer.evaluation_s,
    )


def _check_best_of(count: int, judged: bool) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise AgentConfigError(f"best_of must be a whole number of at least 1, not {count!r}.")
    if count > 1 and not judged:
        raise AgentConfigError(
            f"best_of={count} needs something to tell which of the masks is best; give "
            "score_masks (predictions) or scorer (real scores)."
        )
