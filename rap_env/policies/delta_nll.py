"""The rise in NLL of a chosen mask or plan: measured, or predicted. Without torch."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.frontier import Frontier
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.loading import FrontierPolicy, NetworkPolicy, load_policy
from rap_env.policies.network import LadderPolicy
from rap_env.scoring.predictor_fit import feature_matrix, fit_predictor


def find_delta_nll(
    memory: MemoryModel, policy: Policy, plan: Plan, seq_len_tokens: int | None = None
) -> tuple[float | None, str]:
    """Rise in NLL of a mask or plan in nats per token, None if unknown, and where it is from.

    Sources for masks are the policy's own frontier, else that of the package; the scores in the
    policy's file, which hold for single blocks and for the first blocks of the GSI order; else a
    prediction from both. All else is predicted from level costs, the policy's own or those of the
    package, for sequences of `seq_len_tokens` tokens (None is the length at which they were
    measured), or else from the order over items in the policy's file. Those by kind of text are
    taken for equal shares of all kinds.
    """
    policy = policy.for_text(())
    if not plan:
        return 0.0, "the dense model"
    if plan.is_mask and not isinstance(policy, KnapsackPolicy):
        rise, source = _rise_of_mask(memory, policy, plan)
        if rise is not None:
            return rise, source
    with contextlib.suppress(ArtifactError, UnknownNameError):  # other weights; other levels
        costs = policy if isinstance(policy, KnapsackPolicy) else load_policy("knapsack", memory)
        if isinstance(costs, KnapsackPolicy):
            return costs.delta_nll(plan, seq_len_tokens), _level_source(costs)
    if isinstance(policy, LadderPolicy) and (rise := policy.delta_nll(plan)) is not None:
        return rise, "predicted from the order over items in the policy file"
    return None, f"never measured for this {'mask' if plan.is_mask else 'plan'}"


def _rise_of_mask(memory: MemoryModel, policy: Policy, mask: Plan) -> tuple[float | None, str]:
    """Rise in NLL of a mask by the scores of masks, None if unknown, and where it is from."""
    table = policy
    if not isinstance(policy, FrontierPolicy):
        with contextlib.suppress(ArtifactError):  # raised if it was measured with other weights
            table = load_policy("frontier", memory)
    frontier = table.frontier if isinstance(table, FrontierPolicy) else None
    if frontier and mask in frontier.scores:
        text = frontier.provenance["text"]
        tokens, source = text["windows"] * text["window_tokens"], text["source"]
        where = f"measured for the frontier on {tokens} tokens of {source}"
        return frontier.scores[mask] - frontier.dense_nll, where
    own = policy.file if isinstance(policy, NetworkPolicy) else None
    if own and own.model.fingerprint == memory.facts.fingerprint:
        features, indices = own.features, sorted(mask.removed)
        if len(indices) == 1 and features.one_shot.any():
            return float(features.one_shot[indices[0]]), "one-shot score in the policy file"
        if own.order and set(own.order[: len(indices)]) == set(indices):
            rise = float(features.gsi_marginal_loss[indices].sum())
            return rise, "GSI scores in the policy file"
        if frontier and features.one_shot.any():
            return predicted_delta_nll(frontier, features.one_shot, mask)
    return None, ""


def _level_source(policy: KnapsackPolicy) -> str:
    text = policy.costs.provenance["text"]
    tokens = text["windows"] * text["window_tokens"]
    return f"predicted from one-shot costs of levels on {tokens} tokens of {text['source']}"


def predicted_delta_nll(
    frontier: Frontier, alone: npt.NDArray[np.float64], mask: Plan
) -> tuple[float, str]:
    """Rise in NLL of a mask in nats per token, predicted from a frontier's measured masks.

    Args:
        frontier: The measured masks.
        alone: Rise in NLL without each block alone, nats per token, (2L,).
        mask: The mask, which should be near the frontier, as the masks of a policy are.

    Returns:
        The prediction, and how many masks it is from and how far it errs on held-out ones.
    """
    rises = np.array(list(frontier.scores.values())) - frontier.dense_nll
    features = feature_matrix(list(frontier.scores), frontier.num_blocks)
    predictor, fidelity = fit_predictor(features, rises, alone)
    error = fidelity.rows[0].median_relative_error
    assert error is not None  # a tenth of the masks is held out
    return predictor.delta_nll(mask), (
        f"predicted from {len(rises)} measured masks; median error {error:.0%} on held-out ones"
    )
