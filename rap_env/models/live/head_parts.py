"""The head of a model on some entries of its vocabulary at a time: NLL, gradient, divergences.

Its weights are widened in parts, so that neither they nor all logits are in memory as a whole.

Shapes: N tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.packing import BLOCK

_HEAD_VALUES = 2**23
"""Entries of the head's weights that are in memory at a time, in float32."""


@torch.no_grad()
def head_nll(
    forward: PartialForward, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NLL of each target, (N,), and the gradient of their sum with respect to `hidden`, (N, H).

    Args:
        forward: Has the head.
        hidden: The decoder's output, (N, H).
        targets: The tokens to predict, (N,).
        gradient: Whether the gradient is computed.
    """
    hidden, targets = hidden.float(), targets.to(hidden.device)
    target_logits = hidden.new_empty(len(hidden))

    def keep(first: int, logits: torch.Tensor) -> None:
        rows, columns = _within(targets, first, logits.shape[1])
        target_logits[rows] = logits[rows, columns]

    (total,) = _log_sums(forward, [hidden], keep)
    nll = total - target_logits
    if not gradient:
        return nll, None
    slope = torch.zeros_like(hidden)
    for first, weight, bias in _parts(forward):
        logits, steepness = _capped(forward, hidden, weight, bias)
        errors = logits.sub_(total[:, None]).exp_()
        rows, columns = _within(targets, first, len(weight))
        errors[rows, columns] -= 1
        slope.addmm_(errors if steepness is None else errors.mul_(steepness), weight)
    return nll, slope


@torch.no_grad()
def head_divergences(
    forward: PartialForward, native: torch.Tensor, others: Sequence[torch.Tensor]
) -> list[float]:
    """KL divergence of the predictions for each of some outputs from those for the native one.

    Args:
        forward: Has the head.
        native: The native model's output of the decoder, (N, H).
        others: The decoder's output under plans, (N, H) each.

    Returns:
        Nats per token.
    """
    hidden = [each.float() for each in (native, *others)]
    native_total, *totals = _log_sums(forward, hidden)
    sums = [0.0] * len(others)
    for _, weight, bias in _parts(forward):
        expected = _capped(forward, hidden[0], weight, bias)[0] - native_total[:, None]
        shares = expected.exp()
        for number, (each, total) in enumerate(zip(hidden[1:], totals, strict=True)):
            logits, _ = _capped(forward, each, weight, bias)
            lost = expected - logits.sub_(total[:, None])
            sums[number] += float(lost.mul_(shares).sum(-1).double().mean())
    return sums


def _log_sums(
    forward: PartialForward,
    hidden: Sequence[torch.Tensor],
    note: Callable[[int, torch.Tensor], object] = lambda first, logits: None,
) -> list[torch.Tensor]:
    """The log of the sum of ``exp(logit)`` over the vocabulary, (N,) for each output (N, H).

    `note` is called with the first entry of each part of the vocabulary and its logits.
    """
    totals = [each.new_full((len(each),), -torch.inf) for each in hidden]
    for first, weight, bias in _parts(forward):
        for number, each in enumerate(hidden):
            logits, _ = _capped(forward, each, weight, bias)
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(-1))
            note(first, logits)
    return totals


def _parts(forward: PartialForward) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Parts of the head's rows in float32: the first row, weights (rows, H), and biases (rows,)."""
    head: Any = forward.model.get_output_embeddings()
    matrix = head.matrices["weight"] if isinstance(head, PackedModule) else None
    shape = head.weight.shape if matrix is None else matrix.shape
    size = max(BLOCK, _HEAD_VALUES // shape[1] // BLOCK * BLOCK)
    for first in range(0, shape[0], size):
        part = slice(first, min(first + size, shape[0]))
        if matrix is None:
            weight = head.weight[part].to(forward.model.device).float()
        else:
            weight = torch.empty(part.stop - first, shape[1], device=matrix.device)
            matrix.widen(weight, first)
        yield first, weight, None if head.bias is None else head.bias[part].float()


def _capped(
    forward: PartialForward, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of a part of the vocabulary, (N, rows), and their slope under Gemma's soft cap."""
    logits = nn.functional.linear(hidden, weight, bias)
    with torch.enable_grad():
        inner = logits.detach().requires_grad_()
        capped = forward.adapter.cap_logits(inner)
        if capped is inner:
            return inner.detach(), None
        return capped.detach(), torch.autograd.grad(capped.sum(), inner)[0]


def _within(targets: torch.Tensor, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of targets in a part of the vocabulary, and their places there."""
    rows = ((targets >= first) & (targets < first + size)).nonzero()[:, 0]
    return rows, targets[rows] - first
