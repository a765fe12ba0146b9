"""Naive scoring of a mask: a full forward pass of a plain model, in a separate process.

This module imports nothing of this project. Removed blocks return zeros, the pass computes all
logits, and the loss is torch's own over all of them at once in float32, as in the code of SLEB,
ShortGPT and BlockPruner. It runs in its own process because loading a model with this project also
changes how freed memory is kept, which would speed up the naive loop too.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoFFN(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NaiveModel:
    """A plain Llama-like model and the text that masks are scored on.

    Args:
        tokens: Token ids, shape (windows, T), as nested lists.
    """

    def __init__(self, folder: str, dtype: str, device: str, tokens: list[list[int]]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = model.eval().to(device)
        self._tokens = torch.tensor(tokens, device=device)
        self._parts = [
            part for layer in self._model.model.layers for part in (layer.self_attn, layer.mlp)
        ]

    @torch.no_grad()
    def nll(self, removed: Collection[int]) -> float:
        """Mean NLL without some blocks, nats per token."""
        for index, layer in enumerate(self._model.model.layers):
            attention, ffn = 2 * index, 2 * index + 1
            layer.self_attn = _NoAttention() if attention in removed else self._parts[attention]
            layer.mlp = _NoFFN() if ffn in removed else self._parts[ffn]
        logits = self._model(self._tokens, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), self._tokens[:, 1:].reshape(-1)
        )
        return float(loss)


def serve(pipe: Connection, threads: int, *model_arguments: Any) -> None:
    """Answer each list of removed blocks with (seconds, NLL), until None is received.

    Args:
        pipe: Connection for the lists and the answers.
        threads: Threads of torch.
        model_arguments: As for `NaiveModel`.
    """
    torch.set_num_threads(threads)
    model = NaiveModel(*model_arguments)
    model.nll(())
    pipe.send("ready")
    while (removed := pipe.recv()) is not None:
        began = time.perf_counter()
        nll = model.nll(removed)  # a number on the host, so CUDA has ended too
        pipe.send((time.perf_counter() - began, nll))
