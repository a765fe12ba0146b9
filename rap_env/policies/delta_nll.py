"""The rise in NLL of a chosen plan: measured, or predicted. Without torch."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_costs import LevelCosts
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.packaged_files import packaged_costs, packaged_scores
from rap_env.scoring.score_table import ScoreTable


def find_delta_nll(
    memory: MemoryModel, policy: Policy, plan: Plan, seq_len_tokens: int | None = None
) -> tuple[float | None, str]:
    """Rise in NLL of a plan in nats per token, None if unknown, and where it is from.

    A mask is looked up in the policy's own table, else in the score table of the package, which
    predicts what was not measured. All else is predicted from level costs, the policy's own or
    those of the package, for sequences of `seq_len_tokens` tokens (None is the length at which they
    were measured), or else by the policy itself. Costs by kind of text are taken for equal shares
    of all kinds.
    """
    policy = policy.for_text(())
    if not plan:
        return 0.0, "the dense model"
    if plan.is_mask and policy.level_costs is None:
        table = policy.table
        if table is not None and plan in table.scores:
            text = _text(table.provenance["text"])
            return table.scores[plan] - table.dense_nll, f"measured on {text}"
        with contextlib.suppress(ArtifactError):  # another model, or other weights
            return delta_nll_from_scores(packaged_scores(memory), plan)
    with contextlib.suppress(ArtifactError, UnknownNameError):  # other weights; other levels
        costs = policy.level_costs or packaged_costs(LevelCosts, memory)
        text = _text(costs.provenance["text"])
        rise = costs.delta_nll(plan, seq_len_tokens)
        return rise, f"predicted from one-shot costs of levels on {text}"
    if (predicted := policy.delta_nll(plan, seq_len_tokens)) is not None:
        return predicted, "predicted from the order over items in the policy file"
    return None, f"never measured for this {'mask' if plan.is_mask else 'plan'}"


def delta_nll_from_scores(table: ScoreTable, mask: Plan) -> tuple[float, str]:
    """Rise in NLL of a mask by a score table, and whether it was measured."""
    measured = f"measured on {_text(table.text)}"
    if mask in table.scores:
        return table.scores[mask] - table.dense_nll, measured
    return table.predictor.delta_nll(mask), f"predicted from {len(table.scores)} plans {measured}"


def _text(text: dict[str, Any]) -> str:
    """How much text a file was measured on, and its source in words."""
    source = re.sub(r"/(test|train|validation)\.jsonl", "", text["source"])
    source = re.sub(r"\bself$", "text that the model wrote", source)
    return f"{text['windows'] * text['window_tokens']} tokens of {source}"
