"""Block influence of whole layers, as ShortGPT ranks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rap_env.blocks import BlockMask
from rap_env.importance.one_shot import one_minus_cosine
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward


def layer_influence(llm: ElasticLLM, batches: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    """Block influence of each layer of the dense model (Men et al. 2024, eq. 1).

    ``BI = 1 - E[cos(x, y)]`` with x the residual stream before and y after the layer, the mean
    taken over all tokens. Costs one forward pass and no loss.

    Args:
        llm: The live model.
        batches: The text: token ids, each of shape (windows, T), on the model's device.

    Returns:
        Influence of each layer, shape (L,).
    """
    partial = PartialForward(llm)
    total = torch.zeros(llm.facts.num_layers, dtype=torch.float64)
    with llm.masked(BlockMask()):
        for tokens in batches:
            state = before = partial.enter(tokens)
            for step in partial.steps:
                state = partial.run(step, state)
                if step[-1] % 2:  # the ffn block ends a layer
                    total[step[-1] // 2] += one_minus_cosine(before, state)
                    before = state
    return (total / sum(tokens.numel() for tokens in batches)).numpy()
