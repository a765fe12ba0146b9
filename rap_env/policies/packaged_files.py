"""What the package has of the default model: facts, costs, tables and scores. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from rap_env.artifacts import load_artifact
from rap_env.context.table import TableContext
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.text_kinds import KindCosts
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.policies.method import Basis
from rap_env.scoring.score_table import PREFIX, ScoreTable, table_path

_Costs = TypeVar("_Costs", LevelCosts, KindCosts)

PACKAGED = Path(__file__).parent / "packaged"
"""Folder of the files in the package, named after their model."""

DEFAULT_MODEL = "smollm2-135m"
"""The model of the packaged policies, tables and level costs."""

KNAPSACKS = ("knapsack", "knapsack-by-text")
"""Policies from the level costs in the package; the server has a fallback for other models."""

FACTS_VERSION = 3
"""Format of the facts of the default model in the package."""


def packaged_file(name: str) -> Path:
    """The path of a file of the default model, by the end of its name."""
    return PACKAGED / f"{DEFAULT_MODEL}.{name}".replace("..", ".")


def default_facts(weights: str = "native") -> ModelFacts:
    """Facts of the default model in bfloat16, as shipped with the package; needs no torch.

    Args:
        weights: The format of its weights, ``"native"`` or ``"bf16"``; see `rap_env.load_llm`.

    Raises:
        ArtifactError: The file is damaged.
    """
    body = load_artifact(packaged_file("facts.json"), "model facts", FACTS_VERSION)[weights]
    return ModelFacts.from_json(body)


def packaged_costs(kind: type[_Costs], memory: MemoryModel) -> _Costs:
    """The costs of levels of the default model, or those by kind of text.

    Raises:
        ArtifactError: The model is another one, or the package lacks the file.
    """
    name = "levels.json" if kind is LevelCosts else "kinds.json"
    try:
        return kind.load(packaged_file(name), memory)
    except (FileNotFoundError, ArtifactError):
        raise ArtifactError(
            f"The package has no level costs of {memory.facts.name} as it is loaded "
            f"({memory.facts.weights} weights, {memory.facts.dtype}); measure them in a checkout "
            f"with `python -m experiments.levels model.name={memory.facts.name}`, and give the "
            f"path of the levels.json that it writes as the policy."
        ) from None


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
            f"importance of {facts.name}; compare it with others in a checkout "
            "(`python -m experiments.compare`), or choose one that needs none, such as dense."
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
