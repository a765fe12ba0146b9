"""One-shot importance of blocks: what the removal of each loses, and block influence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rap_env.importance.profiles import OneShotProfile, ScoringMeter
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.scoring.interface import bar_callback
from rap_env.scoring.scorer import PlanScorer


def one_shot(scorer: PlanScorer, *, progress: bool = True) -> OneShotProfile:
    """Measure the removal of every single block: 2L + 1 evaluations, minus stored ones."""
    alone = list(map(Plan.removing, range(scorer.llm.num_blocks)))
    meter = ScoringMeter(scorer)
    with progress_bar(progress, total=len(alone) + 1, desc="one-shot", unit="plan") as bar:
        scorer.nll_many([Plan(), *alone], bar_callback(bar))
    spent = meter.spent(len(alone) + 1)
    return OneShotProfile(
        dense_nll=scorer.native_nll,
        nll_without=tuple(map(scorer.nll, alone)),
        influence=tuple(block_influence(scorer).tolist()),
        provenance=scorer.provenance,
        **spent,
    )


def block_influence(scorer: PlanScorer) -> npt.NDArray[np.float64]:
    """Block influence of ShortGPT (Men et al. 2024, eq. 1) of each block instead of layer, (2L,).

    ``BI = 1 - E[cos(x, y)]`` with x the residual stream before and y after the block, the
    mean taken over all tokens. In a parallel layer the attention block counts first. It costs
    two forward passes; the head does not run.
    """
    return _influence(scorer.llm, scorer.runner.partial, scorer.batches, by_layer=False)


def layer_influence(llm: ElasticLLM, batches: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    """As `block_influence`, of each layer of the native model, (L,); costs one forward pass.

    `batches` are token ids, each of shape (windows, T), on the model's device.
    """
    return _influence(llm, PartialForward(llm, widen=True), batches, by_layer=True)


def _influence(
    llm: ElasticLLM, partial: PartialForward, batches: Sequence[torch.Tensor], *, by_layer: bool
) -> npt.NDArray[np.float64]:
    total = torch.zeros(llm.num_blocks, dtype=torch.float64)
    with llm.applied(Plan()):
        for tokens in batches:
            state = before = partial.enter(tokens)
            for step in partial.steps:
                entered = state
                parts = [step] if by_layer else [step[: n + 1] for n in range(len(step))]
                for blocks in parts:
                    state = partial.run(blocks, entered)
                    if not by_layer or blocks[-1] % 2:  # the ffn block ends a layer
                        total[blocks[-1]] += _one_minus_cosine(before, state)
                        before = state
    influence = (total / sum(tokens.numel() for tokens in batches)).numpy()
    return np.asarray(influence[1::2] if by_layer else influence)


def _one_minus_cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of 1 - cosine, in float64 because influences are close to 0."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - cosine).sum().cpu()
