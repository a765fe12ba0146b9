"""How far a model's predictions are from another's, and in which direction to move."""

from __future__ import annotations

import torch

from rap_env.llm.partial_forward import PartialForward
from rap_env.scoring.loss import HEAD_TOKENS

_ROWS = 16  # float32 rows over the vocabulary that exist at once: they stay in the cache


def divergence(
    partial: PartialForward, student: torch.Tensor, teacher: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Mean Kullback-Leibler divergence of next-token predictions, and its gradient.

    The logits of a few tokens exist at a time, and no graph over the vocabulary is kept.

    Args:
        partial: The model whose head both share.
        student: Decoder outputs of the model that is trained, (N, H).
        teacher: Those of the model that is imitated, (N, H).

    Returns:
        ``KL(teacher || student)`` in nats per token, and its gradient by `student`, (N, H).
    """
    total, gradients = 0.0, []
    pairs = zip(
        torch.split(student.detach(), HEAD_TOKENS), torch.split(teacher, HEAD_TOKENS), strict=True
    )
    for hidden, wanted in pairs:
        with torch.enable_grad():
            hidden.requires_grad_()
            logits = partial.head_logits(hidden)
        by_logits = torch.empty_like(logits)
        with torch.no_grad():
            truth = partial.head_logits(wanted)
            for start in range(0, len(logits), _ROWS):
                rows = slice(start, start + _ROWS)
                log_p = truth[rows].float().log_softmax(dim=-1)
                log_q = logits[rows].float().log_softmax(dim=-1)
                p = log_p.exp()
                total += float((p * (log_p - log_q)).sum())
                by_logits[rows] = (log_q.exp() - p) / len(student)
        gradients.append(torch.autograd.grad(logits, hidden, by_logits)[0])
    return total / len(student), torch.cat(gradients)
