"""The rise in NLL of a chosen plan: measured, or predicted. Without torch."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_table import PlanTable
from rap_env.ladder.observation import ImportanceFeatures
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.policies.packaged_files import packaged_costs, packaged_file
from rap_env.policies.tables import TablePolicy
from rap_env.scoring.predictor_fit import feature_matrix, fit_score_model


def find_delta_nll(
    memory: MemoryModel, policy: Policy, plan: Plan, seq_len_tokens: int | None = None
) -> tuple[float | None, str]:
    """Rise in NLL of a plan in nats per token, None if unknown, and where it is from.

    Sources for masks are the policy's own table, else that of the package; the scores in the
    policy's file, which hold for single blocks and for the first blocks of the GSI order; else a
    prediction from both. All else is predicted from level costs, the policy's own or those of the
    package, for sequences of `seq_len_tokens` tokens (None is the length at which they were
    measured), or else by the policy itself. Those by kind of text are taken for equal shares of all
    kinds.
    """
    policy = policy.for_text(())
    if not plan:
        return 0.0, "the dense model"
    own_costs = policy.costs if isinstance(policy, KnapsackPolicy) else None
    if plan.is_mask and own_costs is None:
        rise, source = _rise_of_mask(memory, policy, plan)
        if rise is not None:
            return rise, source
    with contextlib.suppress(ArtifactError, UnknownNameError):  # other weights; other levels
        costs = own_costs or packaged_costs(LevelCosts, memory)
        text = costs.provenance["text"]
        tokens = text["windows"] * text["window_tokens"]
        source = f"predicted from one-shot costs of levels on {tokens} tokens of {text['source']}"
        return costs.delta_nll(plan, seq_len_tokens), source
    if (rise := policy.delta_nll(plan, seq_len_tokens)) is not None:
        return rise, "predicted from the order over items in the policy file"
    return None, f"never measured for this {'mask' if plan.is_mask else 'plan'}"


def _rise_of_mask(memory: MemoryModel, policy: Policy, mask: Plan) -> tuple[float | None, str]:
    """Rise in NLL of a mask by the scores of masks, None if unknown, and where it is from."""
    table = policy.table if isinstance(policy, TablePolicy) else None
    if table is None or not table.has_masks_only:
        with contextlib.suppress(ArtifactError):  # raised if it was measured with other weights
            table = PlanTable.load(packaged_file("frontier.json"), memory)
    if table is not None and mask in table.scores:
        text = table.provenance["text"]
        tokens, source = text["windows"] * text["window_tokens"], text["source"]
        where = f"measured for the frontier on {tokens} tokens of {source}"
        return table.scores[mask] - table.dense_nll, where
    if not isinstance(policy, NetworkPolicy):
        return None, ""
    own, importance = policy.file.model, policy.file.importance
    if own["fingerprint"] != memory.facts.fingerprint or not isinstance(
        importance, ImportanceFeatures
    ):
        return None, ""
    blocks = sorted(mask.removed)
    if len(blocks) == 1 and importance.one_shot.any():
        return float(importance.one_shot[blocks[0]]), "one-shot score in the policy file"
    if policy.order and sorted(policy.order[: len(blocks)]) == blocks:
        return float(importance.gsi_marginal_loss[blocks].sum()), "GSI scores in the policy file"
    if table is not None and table.has_masks_only and importance.one_shot.any():
        return predicted_delta_nll(table, importance.one_shot, mask)
    return None, ""


def predicted_delta_nll(
    frontier: PlanTable, alone: npt.NDArray[np.float64], mask: Plan
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
    features = feature_matrix(list(frontier.scores), 2 * frontier.num_layers)
    predictor, fidelity = fit_score_model(features, rises, alone)
    error = fidelity.rows[0].median_relative_error
    assert error is not None  # a tenth of the masks is held out
    return predictor.delta_nll(mask), (
        f"predicted from {len(rises)} measured masks; median error {error:.0%} on held-out ones"
    )
