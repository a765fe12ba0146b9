"""Computes NLL from hidden states, a few rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.bfloat16_products import linear

OnLogits = Callable[[torch.Tensor], object]
"""Called with the logits of some tokens, (rows, V), piece by piece in the order of the text."""

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at a time on a CPU, in the model's dtype."""

_LOSS_ROWS = 16  # tokens whose float32 logits are in memory at a time: they fit the CPU cache
_GPU_LOGITS = 2**26  # logits that are in memory at a time on a GPU: few, large kernels
_VOCABULARY_PARTS = 12
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 2e-3


@dataclass(frozen=True)
class _Piece:
    """The rows of the head for a subset of S vocabulary entries.

    Attributes:
        weight: (S, H).
        bias: (S,), or None.
        targets: Index of each target within the subset, (N,).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor


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


class VocabularyBound:
    """A lower bound of the NLL from a subset of the vocabulary, at a fraction of the head's cost.

    ``-log softmax`` of a target grows with every further entry of the vocabulary, so the value
    over a subset with the target is a lower bound. The bound is tight if the subset holds most of
    the probability. A few windows need few entries, so each piece of the text has its own subset.
    `hidden` are decoder outputs under some mask for each of the `batches`, (windows, T, H) and
    (windows, T); the bound is tight for masks under which the same entries are likely.

    Attributes:
        tolerance: How far the bound may exceed the NLL because of rounding, nats per token:
            the logits' dtype rounds, and a smaller matrix product may round differently.
    """

    def __init__(
        self,
        partial: PartialForward,
        hidden: Sequence[torch.Tensor],
        batches: Sequence[torch.Tensor],
    ) -> None:
        self._partial = partial
        self.tolerance = _TOLERANCE.get(partial.head.weight.dtype, _HALF_TOLERANCE)
        windows = sum(len(ids) for ids in batches)
        # All subsets together take no more memory than the head.
        self._windows = -(-windows // _VOCABULARY_PARTS)
        self._pieces = [self._make_pieces(*pair) for pair in zip(hidden, batches, strict=True)]

    @torch.inference_mode()
    def window_nll(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Lower bound of each window's mean NLL, nats per token, float64, (windows,).

        `hidden` is the decoder's output for the windows of the batch, (windows, T, H).
        """
        losses = []
        for part, piece in zip(
            torch.split(hidden, self._windows), self._pieces[batch], strict=True
        ):
            rows = part[:, :-1].reshape(-1, part.shape[-1])
            logits = self._partial.adapter.cap_logits(linear(rows, piece.weight, piece.bias))
            losses.append(token_nll(logits, piece.targets).view(len(part), -1))
        return torch.cat(losses).double().mean(dim=1)

    @torch.inference_mode()
    def _make_pieces(self, hidden: torch.Tensor, ids: torch.Tensor) -> list[_Piece]:
        parts = zip(
            torch.split(hidden, self._windows), torch.split(ids, self._windows), strict=True
        )
        return [self._make_piece(*predictions(*part)) for part in parts]

    def _make_piece(self, rows: torch.Tensor, targets: torch.Tensor) -> _Piece:
        head = self._partial.head
        mass = torch.zeros(len(head.weight), device=rows.device)
        most, few_rows = tokens_at_once(rows.device, head.out_features)
        for part in torch.split(rows, most):
            for few in torch.split(self._partial.logits(part), few_rows):
                mass += few.float().softmax(dim=-1).sum(dim=0)
        likely = mass.topk(len(mass) // _VOCABULARY_PARTS).indices
        entries = torch.unique(torch.cat([likely, targets]))  # sorted
        bias = None if head.bias is None else head.bias[entries]
        return _Piece(head.weight[entries], bias, torch.searchsorted(entries, targets))
