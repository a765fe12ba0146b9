"""Logits at every position of a prefill, a few positions at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from rap_env.models.live.elastic import ElasticLLM

_POSITIONS = 8
"""Positions whose logits are in memory at a time."""


class PositionLogits:
    """The logits at all positions of passes that return only the last position's.

    Args:
        llm: The live model. Nothing else may run or change it between a pass and `parts`.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self._cap = getattr(llm.adapter.config, "final_logit_softcapping", None)
        self._states: torch.Tensor | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the hidden states of the last pass in a ``with`` block."""

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self._states = output.last_hidden_state

        hook = self._llm.adapter.decoder(self._llm.model).register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def parts(self) -> Iterator[torch.Tensor]:
        """Yield the logits of the recorded pass, (some positions, V), float32; of its first row."""
        if self._states is None:
            return
        states, self._states = self._states[0], None
        head = self._llm.model.get_output_embeddings()
        for some in torch.split(states, _POSITIONS):
            logits = head(some).float()
            yield logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)
