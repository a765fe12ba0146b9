"""What the package has of the default model: facts, costs, tables and scores. Without torch."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from rap_env.artifacts import load_artifact
from rap_env.context.table import TableContext
from rap_env.errors import ArtifactError, UnknownNameError, counted
from rap_env.importance.level_costs import LevelCosts, prepared_costs
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis
from rap_env.scoring.score_table import PREFIX, ScoreTable, table_path

PACKAGED = Path(__file__).parent / "packaged"
"""Folder of the files in the package, named after their model."""

DEFAULT_MODEL = "smollm2-135m"
"""The model of the packaged policies, tables and level costs."""

_PREPARED_PER_MINUTE = 30e6  # parameters of blocks, on two cores with AVX2 alone

FACTS_VERSION = 3
"""Format of the facts of the default model in the package."""


def packaged_file(name: str) -> Path:
    """The path of a file of the default model, by the end of its name."""
    return PACKAGED / f"{DEFAULT_MODEL}.{name}".replace("..", ".")


def default_facts(weights: str = "native") -> ModelFacts:
    """Facts of the default model in bfloat16, as shipped with the package; needs no torch.

    Args:
        weights: The format of its weights, ``"native"`` or ``"bf16"``; see
            `rap_env.load_llm`.

    Raises:
        ArtifactError: The file is damaged.
    """
    body = load_artifact(packaged_file("facts.json"), "model facts", FACTS_VERSION)[weights]
    return ModelFacts.from_json(body)


def model_costs(memory: MemoryModel) -> LevelCosts:
    """The costs of levels that a model was prepared with, or those of a model in the package.

    Raises:
        ArtifactError: The model is another one and was not prepared, or a file is damaged.
    """
    if (prepared := prepared_costs(memory)) is not None:
        return prepared
    try:
        return LevelCosts.load(packaged_file("levels.json"), memory)
    except (FileNotFoundError, ArtifactError):
        facts = memory.facts
        raise ArtifactError(
            f"{facts.name} has no measured level costs as it is loaded ({facts.weights} weights, "
            f"{facts.dtype}); `rap prepare {facts.name}` makes them once (about "
            f"{counted(_prepare_minutes(facts), 'minute')}), and plans lose less quality with them."
        ) from None


def lacks_costs(memory: MemoryModel) -> bool:
    """Whether a model has no costs of levels, so that preparing it would gain plans."""
    try:
        model_costs(memory)
    except ArtifactError:
        return True
    return False


def _prepare_minutes(facts: ModelFacts) -> int:
    """About what preparing a model takes on two cores, by its matrices (three in an FFN block)."""
    width = facts.hidden_size
    parameters = facts.num_layers * width * (2 * width + 3 * facts.ffn_width)
    return max(1, round(parameters / _PREPARED_PER_MINUTE))


def packaged_scores(memory: MemoryModel) -> ScoreTable:
    """The score table of the default model in the package, with its weights as they are loaded.

    Raises:
        ArtifactError: The model is another one.
    """
    facts = memory.facts
    path = table_path(f"{PREFIX}{DEFAULT_MODEL}", "native" if facts.packed else "bf16")
    assert path is not None  # a packaged name always has a path
    table = ScoreTable.load(path)
    if table.facts.fingerprint != facts.fingerprint:
        raise ArtifactError(
            f"The package has scores of {table.facts.name} only, and this policy needs scores or "
            f"importance of {facts.name}; choose one that needs none, such as knapsack or dense."
        )
    return table


def packaged_basis(memory: MemoryModel) -> Basis:
    """The packaged context of the default model, and the levels that were measured for it.

    Raises:
        ArtifactError: The model is another one.
    """
    levels = "all" if memory.facts.packed else "masks"
    context = packaged_context(memory)
    return Basis(context, LadderBytes(memory, Ladder.of(context.table.facts, levels)))


def packaged_context(memory: MemoryModel) -> TableContext:
    """The scores and the importance of the default model, from the score table in the package.

    Raises:
        ArtifactError: The model is another one.
    """
    table = packaged_scores(memory)
    importance = "gsi" if table.gsi else "one_shot"
    return TableContext(table, DEFAULT_MODEL, importance=importance, memory=memory)


def find_delta_nll(
    memory: MemoryModel, policy: Policy, plan: Plan, seq_len_tokens: int | None = None
) -> tuple[float | None, str]:
    """Rise in NLL of a plan in nats per token, None if unknown, and where it is from.

    A plan is looked up in the policy's own table; one that only removes blocks else in the
    score table of the package, which predicts what was not measured. All else is predicted
    from level costs, the policy's own or those of the package, for sequences of
    `seq_len_tokens` tokens (None is the length at which they were measured), or else by the
    policy itself.
    """
    if not plan:
        return 0.0, "the native model"
    table = policy.table
    if table is not None and plan in table.scores:
        text = _text(table.provenance["text"])
        return table.scores[plan] - table.dense_nll, f"measured on {text}"
    if plan.is_mask and policy.level_costs is None:
        with contextlib.suppress(ArtifactError):  # another model, or other weights
            return delta_nll_from_scores(packaged_scores(memory), plan)
    with contextlib.suppress(ArtifactError, UnknownNameError):  # other weights; other levels
        costs = policy.level_costs or model_costs(memory)
        text = _text(costs.provenance["text"])
        rise = costs.delta_nll(plan, seq_len_tokens)
        return rise, f"predicted from costs of levels on {text}"
    if (predicted := policy.delta_nll(plan, seq_len_tokens)) is not None:
        return predicted, "predicted from the order over items in the policy file"
    return None, "never measured for this plan"


def delta_nll_from_scores(table: ScoreTable, plan: Plan) -> tuple[float, str]:
    """Rise in NLL of a plan that only removes blocks by a score table, and if it was measured."""
    measured = f"measured on {_text(table.text)}"
    if plan in table.scores:
        return table.scores[plan] - table.native_nll, measured
    return table.predictor.delta_nll(plan), f"predicted from {len(table.scores)} plans {measured}"


def _text(text: dict[str, Any]) -> str:
    """How much text a file was measured on, and its source in words."""
    source = re.sub(r"/(test|train|validation)\.jsonl", "", text["source"])
    source = re.sub(r"\bself$", "text that the model wrote", source)
    source = re.sub(r"\bmixture$", "chats, articles and code", source)
    return f"{text['windows'] * text['window_tokens']} tokens of {source}"
