"""What an agent observes of a context's model, and batches of it as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rap_env.context.base import PruningContext, item_importance
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.ladder.observation import Observation, ObservationEncoder


def make_encoder(context: PruningContext, ladder: Mapping[str, Any] | None) -> ObservationEncoder:
    """Make what encodes the observations of a context's model.

    Args:
        context: The model with the importance that an agent observes.
        ladder: `Ladder.spec` of the items of `RAPLadder-v0`; None for `RAPPrune-v0`.
    """
    if ladder is None:
        return ObservationEncoder(mask_bytes(context.memory), context.features)
    ladder_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, **ladder))
    return ObservationEncoder(ladder_bytes, item_importance(context, ladder_bytes))


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """Return an observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}
