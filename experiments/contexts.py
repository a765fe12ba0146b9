"""From settings to live parts: context, environment, texts and tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config import Config, TasksConfig, TextConfig
from experiments.errors import ExperimentError
from rap_env.context.base import ContextConfig, PruningContext
from rap_env.context.opening import open_context
from rap_env.scoring.corpus import CorpusConfig, ensure_disjoint, load_corpus
from rap_env.scoring.score_table import table_path

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer
    from rap_env.scoring.tasks import TaskConfig

GSI_FILE = "gsi.json"
FRONTIER_FILE = "frontier.json"

NEEDS_MODEL = {
    "profile": "measures the importance of its blocks",
    "evaluate": "judges masks on text that no table holds",
    "demo": "begins with its profile",
    "export_scores": "measures it",
    "repair": "fits stubs to its hidden states",
}
"""Why a stage needs a live model; the others do with a score table."""


def gsi_artifact(config: Config) -> Path:
    """Where this comparison's GSI artifact lies once it is profiled."""
    return config.stage_dir("profile") / GSI_FILE


def frontier_artifact(config: Config) -> Path:
    """Where this comparison's frontier table lies once it is built."""
    return config.stage_dir("profile") / FRONTIER_FILE


def context_config(config: Config, *, profiled: bool = True) -> ContextConfig:
    """What to measure with.

    Args:
        config: All settings.
        profiled: Take the importance from this comparison's artifact, if there is one, so that
            an agent is evaluated with the very numbers that it was trained with.
    """
    importance = config.importance.method
    artifact = gsi_artifact(config)
    if profiled and importance == "gsi" and artifact.exists():
        importance = str(artifact)
    return ContextConfig(
        model=config.model.name,
        device=config.model.device,
        dtype=config.model.dtype,
        max_memory_bytes=config.model.max_memory_bytes,
        calibration=CorpusConfig(**asdict(config.calibration), role="calibration"),
        importance=importance,
        gsi_removals=config.importance.gsi_removals,
        gsi_method=config.importance.gsi_method,
        repair=config.repair.name,
        frontier=str(frontier_artifact(config)),
        store=config.store,
    )


def build_context(config: Config, *, profiled: bool = True) -> PruningContext:
    """The context of this comparison; one for each config in a process.

    Raises:
        ExperimentError: The model is a score table, and the stage needs a live one.
        RapError: As loading the model, the text, the store or an artifact does.
    """
    refuse_table(config)
    return open_context(context_config(config, profiled=profiled))


def refuse_table(config: Config) -> None:
    """Refuse a score table where a stage needs a live model.

    Raises:
        ExperimentError: The model is a score table, and the stage needs a live one.
    """
    if table_path(config.model.name) is not None and config.stage in NEEDS_MODEL:
        raise ExperimentError(
            f"experiments.{config.stage} needs a live model, since it {NEEDS_MODEL[config.stage]}, "
            f"but model.name is {config.model.name}; give the model whose scores these are."
        )


def held_out_scorer(text: TextConfig, role: str, context: PruningContext) -> MaskScorer:
    """Scores masks on a text that no search has seen.

    Raises:
        CorpusError: The text is too short or overlaps with the calibration text.
        ModelNotAvailableError: The context is a score table, which knows one text alone.
    """
    from rap_env.scoring.scorer import MaskScorer

    corpus = load_corpus(CorpusConfig(**asdict(text), role=role), context.llm)
    ensure_disjoint(context.corpus, corpus)
    return MaskScorer(context.llm, corpus, context.store)


def task_config(tasks: TasksConfig) -> TaskConfig:
    """The tasks in the scorer's own terms."""
    from rap_env.scoring.tasks import TaskConfig

    return TaskConfig(
        names=tuple(tasks.names),
        limit=tasks.limit,
        data_root=tasks.data_root,
        num_fewshot=tasks.num_fewshot,
    )
