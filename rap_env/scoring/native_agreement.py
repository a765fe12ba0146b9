"""Compares the next-token distributions of plans with the native model's, on the scored text.

The native model's last hidden states are kept, a few numbers for each token. Its logits are
computed again from them, for one batch of windows at a time, in the dtype in which the model
returns them, so that memory is bounded and nothing is rounded or left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from rap_env.plan import Plan
from rap_env.scoring.plan_runner import Node, OnLogits, predictions, tokens_at_once
from rap_env.scoring.scorer import PlanScorer

METRIC = "native_agreement"
"""The store's metric for the fields of `NativeAgreement`."""


@dataclass(frozen=True)
class NativeAgreement:
    """How close the next-token distributions of a plan are to the native model's on a text.

    Attributes:
        kl_divergence_mean: Mean over the text's tokens of the KL divergence from the native
            model, the sum over the vocabulary of p log(p / q) with the native probabilities p
            and the plan's q, nats.
        kl_divergence_p99: Its 99th percentile over tokens, nats.
        same_top_token_share: Share of tokens for which both rate the same token highest.
    """

    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float


class TokenComparison:
    """Compares logits of some plans with those of the native model for the same tokens.

    Args:
        native: The native logits of a batch of windows, (N, V).
        plans: The plans.
    """

    def __init__(self, native: torch.Tensor, plans: Sequence[Plan]) -> None:
        self._native = native
        self._plans = plans
        self._rows = 0  # compared so far
        self._kl_divergence: list[torch.Tensor] = []
        self._same_top_token: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> None:
        """Compare the next rows of the first plan's logits, then of the second's ..., (rows, V)."""
        _, most = tokens_at_once(logits.device, logits.shape[1])
        for rows in torch.split(logits, most):  # in float32
            numbers = torch.arange(self._rows, self._rows + len(rows)) % len(self._native)
            native = self._native[numbers.to(rows.device)].float().log_softmax(dim=-1)
            ours = rows.float().log_softmax(dim=-1)
            divergence = functional.kl_div(ours, native, reduction="none", log_target=True)
            self._kl_divergence.append(divergence.sum(dim=-1))
            self._same_top_token.append(ours.argmax(dim=-1) == native.argmax(dim=-1))
            self._rows += len(rows)
        if self._rows == len(self._native) * len(self._plans):
            self._native = self._native[:0].clone()  # frees the logits

    def by_plan(self) -> dict[Plan, npt.NDArray[np.float64]]:
        """By plan: KL divergence of each token, nats, and 1 for the same top token, (2, N)."""
        parts = (self._kl_divergence, self._same_top_token)
        values = torch.stack([torch.cat(part).double() for part in parts]).cpu().numpy()
        return dict(zip(self._plans, np.split(values, len(self._plans), axis=1), strict=True))


def agreement_of(tokens: npt.NDArray[np.float64]) -> NativeAgreement:
    """The agreement of one plan from `TokenComparison.by_plan`, (2, tokens)."""
    kl_divergence, same_top_token = tokens
    return NativeAgreement(
        float(kl_divergence.mean()),
        float(np.quantile(kl_divergence, 0.99)),
        float(same_top_token.mean()),
    )


class AgreementScorer(PlanScorer):
    """Measures NLL and, from the same logits, how far plans are from the native model.

    For arguments and attributes see `PlanScorer`; NLL is the same, bit for bit. A plan costs
    one more pass through the head, for the native logits, and a softmax of both. The native
    logits of one batch of windows are in memory meanwhile, which a memory cap does not count.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._agreements: dict[Plan, NativeAgreement] = {}
        self._comparisons: list[TokenComparison] = []  # of the plans that run now
        self._native_states: dict[int, torch.Tensor] = {}  # by batch

    def agreement(self, plan: Plan) -> NativeAgreement:
        """The agreement of a plan with the native model.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        self.window_nll(plan)
        return self._agreements[plan]

    def release(self) -> None:
        """Free what is kept for later calls."""
        self._native_states.clear()
        super().release()

    def look_up(self, plan: Plan) -> npt.NDArray[np.float64] | None:
        """NLL of each window, (windows,), if that and the agreement are known, or None."""
        values = super().look_up(plan)
        if values is None or plan in self._agreements:
            return values
        stored = None if self.store is None else self.store.get(self.context, plan, METRIC)
        if stored is None:
            return None
        self._agreements[plan] = NativeAgreement(*stored)
        return values

    def _measure(self, plans: Sequence[Plan], keep: Collection[Node]) -> None:
        self._comparisons = []
        super()._measure(plans, keep)
        by_batch = [comparison.by_plan() for comparison in self._comparisons]
        self._comparisons = []
        tokens = {plan: [part[plan] for part in by_batch if plan in part] for plan in plans}
        for plan, parts in tokens.items():
            self._agreements[plan] = agreement_of(np.concatenate(parts, axis=1))
            if self.store is not None:
                self.store.put(self.context, plan, METRIC, astuple(self._agreements[plan]))

    def _on_logits(self, batch: int, plans: Sequence[Plan]) -> OnLogits | None:
        comparison = TokenComparison(self._native_logits(batch), plans)
        self._comparisons.append(comparison)
        return comparison.add

    def _native_logits(self, batch: int) -> torch.Tensor:
        """The native model's logits for a batch of windows in the model's dtype, (N, V)."""
        partial = self.runner.partial
        if batch not in self._native_states:
            last = self.runner.run(batch, [Plan()], lambda _node, _state: None)[Plan()]
            self._native_states[batch], _ = predictions(partial.leave(last), self.batches[batch])
        states = self._native_states[batch]
        most, _ = tokens_at_once(states.device, self.llm.facts.vocab_size)
        return torch.cat([partial.logits(part) for part in torch.split(states, most)])
