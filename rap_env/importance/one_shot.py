"""Importance of each block for the dense model alone: loss rise, and block influence."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from rap_env.artifacts import save_artifact
from rap_env.blocks import BlockMask
from rap_env.importance.provenance import load_profile, provenance_of
from rap_env.memory import HasFacts
from rap_env.scoring.scorer import MaskScorer, ticker

_KIND, _FORMAT = "one-shot importance", 1


@dataclass(frozen=True)
class OneShotProfile:
    """Scores of the 2L blocks of a dense model.

    Attributes:
        dense_nll: NLL of the dense model, nats per token.
        nll_without: NLL without each block, nats per token, length 2L.
        influence: Block influence of each block, length 2L (see `block_influence`).
        evaluations: Masks that had to be known for it, stored ones included.
        evaluations_run: Masks that were really run.
        block_forwards: Blocks that were really run.
        seconds: Wall time it took, for what was really run.
        provenance: Model, text and versions.
    """

    dense_nll: float
    nll_without: tuple[float, ...]
    influence: tuple[float, ...]
    evaluations: int
    evaluations_run: int
    block_forwards: float
    seconds: float
    provenance: dict[str, Any]

    @property
    def loss_rise(self) -> npt.NDArray[np.float64]:
        """Rise in NLL if a block is removed from the dense model, nats per token, (2L,)."""
        return np.array(self.nll_without) - self.dense_nll

    @property
    def block_influence(self) -> npt.NDArray[np.float64]:
        """1 - cosine between the residual stream before and after each block, (2L,)."""
        return np.array(self.influence)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact."""
        save_artifact(path, _KIND, _FORMAT, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> OneShotProfile:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, of another model, or of one with other stubs.
        """
        return cls(**load_profile(path, _KIND, _FORMAT, model))


def one_shot(scorer: MaskScorer, *, progress: bool = True) -> OneShotProfile:
    """Measure every block of the dense model: 2L + 1 evaluations, less what is stored."""
    began = time.perf_counter()
    before = scorer.evaluations, scorer.block_forwards
    dense = scorer.dense_nll
    blocks = scorer.llm.blocks
    with tqdm(
        total=len(blocks), desc="one-shot importance", unit="mask", leave=False,
        disable=None if progress else True,
    ) as bar:  # fmt: skip
        without = scorer.scan(BlockMask(), on_score=ticker(bar))
    return OneShotProfile(
        dense_nll=dense,
        nll_without=tuple(without[block] for block in blocks),
        influence=tuple(block_influence(scorer).tolist()),
        evaluations=len(blocks) + 1,
        evaluations_run=scorer.evaluations - before[0],
        block_forwards=scorer.block_forwards - before[1],
        seconds=time.perf_counter() - began,
        provenance=provenance_of(scorer),
    )


def block_influence(scorer: MaskScorer) -> npt.NDArray[np.float64]:
    """Block influence of ShortGPT (Men et al. 2024, eq. 1), for each block instead of each layer.

    ``BI = 1 - E[cos(x, y)]`` with x the residual stream before and y after the block, the mean
    taken over all tokens. In a parallel layer the attention block is counted first. Costs two
    forward passes and no loss.

    Returns:
        Influence of each block, shape (2L,).
    """
    partial = scorer.runner.partial
    total = torch.zeros(scorer.llm.num_blocks, dtype=torch.float64)
    with scorer.llm.masked(BlockMask()):
        for tokens in scorer.batches:
            state = partial.enter(tokens)
            for step in partial.steps:
                entered = before = state
                for count, block in enumerate(step, start=1):
                    state = partial.run(step[:count], entered)
                    total[block] += one_minus_cosine(before, state)
                    before = state
    return (total / scorer.corpus.tokens.numel()).numpy()


def one_minus_cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Summed over tokens, in float64: influences are small differences from 1."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - cosine).sum().cpu()
