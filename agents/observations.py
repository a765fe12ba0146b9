"""What builds the observations that agents train on, and observations as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rap_env.context.base import PruningContext, item_importance
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.ladder.observation import (
    ItemObservationBuilder,
    Observation,
    ObservationBuilder,
)
from rap_env.request import Request

Builder = ObservationBuilder | ItemObservationBuilder
"""Builds the observations of `RAPPrune-v0` or of `RAPPrune-v1`."""


def make_builder(context: PruningContext, ladder: Mapping[str, Any] | None) -> Builder:
    """Make what builds the observations of a context's model.

    Args:
        context: The model with the importance that an agent observes.
        ladder: `Ladder.spec` of the items of `RAPPrune-v1`; None for `RAPPrune-v0`.
    """
    if ladder is None:
        return ObservationBuilder(context.memory, context.features)
    item_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, **ladder))
    return ItemObservationBuilder(item_bytes, item_importance(context, item_bytes))


def check_feasible(builder: Builder, request: Request) -> None:
    """Reject a request that the model cannot serve, or whose budget nothing can meet.

    Raises:
        InvalidRequestError: The model cannot serve the batch size or the length.
        InfeasibleBudgetError: No mask, or no plan of the ladder, fits the budget.
    """
    memory = builder.memory
    memory.check(request.batch_size, request.seq_len_tokens)
    if isinstance(builder, ItemObservationBuilder):
        builder.item_bytes.check_feasible(request)
    else:
        memory.check_feasible(request)


def as_tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """Return an observation as tensors that share its memory."""
    return {key: torch.from_numpy(array) for key, array in observation.items()}
