"""Logits of one text under a plan or in llama.cpp, compared with those of the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from experiments.llama_cpp import LlamaCpp
from experiments.study.harness import delta_nll_fields
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring.native_agreement import TokenComparison, agreement_of
from rap_env.scoring.plan_runner import HEAD_TOKENS, token_nll


@torch.inference_mode()
def window_logits(llm: ElasticLLM, plan: Plan, window: torch.Tensor) -> torch.Tensor:
    """Logits of a window's positions but the last, in the model's dtype: (T,) to (T - 1, V)."""
    forward = PartialForward(llm, widen=True)
    with llm.applied(plan):
        hidden = forward.hidden(window[None].to(llm.device))[0, :-1]
        return torch.cat([forward.logits(part) for part in torch.split(hidden, HEAD_TOKENS)]).cpu()


def compared(
    native_logits: Iterable[torch.Tensor],
    windows: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    parts: int,
) -> dict[str, Any]:
    """The fields of a row from a method's logits.

    Args:
        native_logits: Logits of the unquantised model for each window, (T - 1, V) each.
        windows: Token ids, (windows, T).
        logits: The method's logits of a window, (T,) to (T - 1, V).
        parts: Parts of a window that count as windows of their own for intervals.
    """
    delta_nll, tokens = [], []
    for native, window in zip(native_logits, windows, strict=True):
        own = logits(window)
        own_nll, native_nll = (token_nll(part, window[1:]) for part in (own, native))
        delta_nll += [float(rise.mean()) for rise in (own_nll - native_nll).tensor_split(parts)]
        comparison = TokenComparison(native, [Plan()])
        comparison.add(own)
        tokens.append(comparison.by_plan()[Plan()])
    agreement = agreement_of(np.concatenate(tokens, axis=1))
    return {**delta_nll_fields(delta_nll), **asdict(agreement)}


def logits_of(engine: LlamaCpp, window: torch.Tensor) -> torch.Tensor:
    """The same as `window_logits` in llama.cpp."""
    return torch.from_numpy(engine.logits(window.numpy().astype(np.int32)))
