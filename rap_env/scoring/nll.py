"""Computes NLL from hidden states, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from rap_env.models.live.partial_forward import PartialForward

OnLogits = Callable[[torch.Tensor], object]
"""Called with the logits of some tokens, (rows, V), piece by piece in the order of the text."""

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at a time on a CPU, in the model's dtype."""

_LOSS_ROWS = 16  # tokens whose float32 logits are in memory at a time: they fit the CPU cache
_GPU_LOGITS = 2**26  # logits that are in memory at a time on a GPU: few, large kernels


def tokens_at_once(device: torch.device, vocab_size: int) -> tuple[int, int]:
    """Tokens whose logits are in memory at a time: in the model's dtype, and in float32."""
    if device.type == "cpu":
        return HEAD_TOKENS, _LOSS_ROWS
    most = max(1, _GPU_LOGITS // vocab_size)
    return most, most


def window_nll(
    partial: PartialForward,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    on_logits: OnLogits | None = None,
) -> torch.Tensor:
    """Mean NLL of each window, nats per token, float64, (windows,).

    `hidden` is the decoder's output for the tokens `ids`: (windows, T, H) and (windows, T).
    """
    rows, targets = predictions(hidden, ids)
    most, _ = tokens_at_once(rows.device, partial.head.out_features)
    losses = []
    for part, expected in zip(torch.split(rows, most), torch.split(targets, most), strict=True):
        logits = partial.logits(part)
        losses.append(token_nll(logits, expected))
        if on_logits is not None:
            on_logits(logits)
    return torch.cat(losses).view(ids.shape[0], -1).double().mean(dim=1)


def predictions(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict a token, (N, H), and the tokens to predict on their device, (N,)."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1).to(hidden.device)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL of each target in float32, (N, V) and (N,) -> (N,), a few float32 rows at a time."""
    _, most = tokens_at_once(logits.device, logits.shape[1])
    return torch.cat(
        [
            functional.cross_entropy(rows.float(), expected, reduction="none")
            for rows, expected in zip(
                torch.split(logits, most), torch.split(targets, most), strict=True
            )
        ]
    )
