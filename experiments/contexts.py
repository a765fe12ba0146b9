"""Build pruning contexts, scorers, tasks, and cells of evaluations from the settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.config import Config
from experiments.config.common import Cell, TextConfig
from experiments.config.program_settings import EvaluateConfig
from experiments.study.console import ExperimentError
from rap_env.context.base import ContextConfig, PruningContext
from rap_env.context.opening import open_context
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.models.live.elastic import ElasticLLM
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig, ensure_disjoint
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.score_table import table_path

GSI_FILE = "gsi.json"
FRONTIER_FILE = "frontier.json"


def frontier_artifact(config: Config) -> Path:
    """Return the path of this comparison's frontier table, which its profile writes."""
    return config.stage_dir("profile") / FRONTIER_FILE


def context_config(config: Config, *, profiled: bool = True) -> ContextConfig:
    """Return the settings of the pruning context.

    Args:
        config: All settings.
        profiled: Whether to read the importance from this comparison's artifact, if it
            exists, so that agents are evaluated with the same numbers that they were trained
            with.
    """
    importance = config.importance.method
    artifact = config.stage_dir("profile") / GSI_FILE
    of_blocks = config.env.task.layout == "blocks"  # the profile measures GSI over them
    if profiled and of_blocks and importance == "gsi" and artifact.exists():
        importance = str(artifact)
    frontier = frontier_artifact(config)
    # That of the table.
    own = table_path(config.model.name) is not None and not frontier.exists()
    return ContextConfig(
        model=config.model.name,
        device=config.model.device,
        dtype=config.model.dtype,
        weights=config.model.weights,
        calibration=CorpusConfig(**asdict(config.calibration), role="calibration"),
        importance=importance,
        gsi_removals=config.importance.gsi_removals,
        gsi_method=config.importance.gsi_method,
        frontier=None if own else str(frontier),
        store=config.store,
    )


def build_context(config: Config, *, profiled: bool = True) -> PruningContext:
    """Return the pruning context of this comparison; a process opens each one only once.

    Raises:
        ExperimentError: The model is a score table, but the stage needs a live model.
        RapError: The model, text, store or an artifact cannot be loaded.
    """
    if config.stage != "train" and table_path(config.model.name) is not None:
        raise ExperimentError(
            f"experiments.{config.stage} needs a live model, because it measures what no score "
            f"table contains, but model.name is {config.model.name}. Set model.name to the model "
            "that the table was measured on."
        )
    return open_context(context_config(config, profiled=profiled))


def make_ladder_bytes(config: Config, context: PruningContext) -> LadderBytes:
    """Return the byte arithmetic over the items that the environment's actions lower."""
    return LadderBytes(context.memory, Ladder.of(context.memory.facts, **config.env.ladder))


def load_text(text: TextConfig, role: str, llm: ElasticLLM) -> Corpus:
    """Load a text for a role: ``"calibration"``, ``"selection"`` or ``"report"``."""
    return load_corpus(CorpusConfig(**asdict(text), role=role), llm)


def held_out_text(text: TextConfig, role: str, context: PruningContext) -> Corpus:
    """Load a text that no search has used.

    Raises:
        CorpusError: The text is too short or overlaps with the calibration text.
        ModelNotAvailableError: The context is a score table, which has scores on one text
            only.
    """
    corpus = load_text(text, role, context.llm)
    ensure_disjoint(context.corpus, corpus)
    return corpus


@dataclass(frozen=True)
class EvaluationCell:
    """A request at a budget, at which all methods are compared.

    Attributes:
        target_delta_nll: ΔNLL that the budget stands for, nats per token, if it stands for
            one.
    """

    cell: Cell
    request: Request
    target_delta_nll: float | None = None


def evaluation_cells(grid: EvaluateConfig, ladder_bytes: LadderBytes) -> list[EvaluationCell]:
    """Return every cell of the grid of requests and budgets, then the pinned ones.

    Args:
        grid: Requests and budgets.
        ladder_bytes: The ladder, which decides which budgets can be met.
    """
    cells, memory = [], ladder_bytes.memory
    for shape in grid.shapes:
        for fraction in sorted(set(grid.budgets), reverse=True):
            request = Request.at_fraction(memory, *shape, fraction)
            cells.append(EvaluationCell((*shape, fraction), request))
    for pinned in grid.pinned_cells:
        request = Request(*pinned.shape, budget_bytes=pinned.budget_bytes)
        place = (*pinned.shape, pinned.budget_bytes / memory.native_peak_bytes(*pinned.shape))
        target = pinned.target_delta_nll
        cells.append(EvaluationCell(place, request, target_delta_nll=target))
    for cell in cells:
        ladder_bytes.check_feasible(cell.request)
    return cells
