"""Open the context that a configuration describes; one per configuration in a process."""

from __future__ import annotations

import logging
import multiprocessing
from functools import cache, partial
from pathlib import Path

from rap_env.context.base import IMPORTANCES, ContextConfig, PruningContext
from rap_env.context.live import LiveContext
from rap_env.context.table import open_table
from rap_env.errors import ModelNotAvailableError, check_name
from rap_env.extras import require_extra
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import check_source
from rap_env.scoring.score_table import table_path
from rap_env.scoring.store import ScoreStore

log = logging.getLogger(__name__)


def open_context(config: ContextConfig) -> PruningContext:
    """The context for a configuration; equal configurations share one in a process.

    Raises:
        RapError: As loading the model, the text, the store, a table or an artifact does.
    """
    if not Path(config.importance).is_file():
        hint = "Any other value is the path of a GSI artifact; there is no such file."
        check_name("importance", config.importance, IMPORTANCES, hint)
    table = table_path(config.model, config.weights)
    if table is None:
        check_source(config.calibration.source)
    exists = table is not None and table.exists()
    return _opened(config, table, table.stat().st_mtime_ns if table and exists else None)


@cache
def _opened(config: ContextConfig, table: Path | None, _modified_ns: int | None) -> PruningContext:
    """The context of a configuration; a table that was rewritten is opened again."""
    return _open_live(config) if table is None else open_table(table, config)


def _open_live(config: ContextConfig) -> LiveContext:
    """A new context of a live model; the model itself is shared within a process."""
    require_extra("model", f"The live model {config.model!r} (unlike a score table)")
    from rap_env.models.files.loading import shared_llm
    from rap_env.scoring.corpus_loading import load_corpus

    llm = shared_llm(config.model, device=config.device, dtype=config.dtype, weights=config.weights)
    context = LiveContext(
        llm,
        load_corpus(config.calibration, llm),
        config,
        open_store(config.store),
        folder=cache_dir() / "importance",
        reopen=partial(open_context, config),
    )
    _warn_of_a_copy(context)
    return context


def _warn_of_a_copy(context: LiveContext) -> None:
    """Warn in a worker process of `multiprocessing` that it has a copy of the model."""
    if multiprocessing.parent_process() is None:
        return
    native = context.memory.breakdown(Plan(), Request(1, 1, budget_bytes=1))
    log.warning(
        "This worker process loads its own copy of %s: %.0f MiB of weights. To share one model, "
        "let gymnasium.make_vec choose the vector environment (leave out vectorization_mode), "
        "which steps all sub-environments in one process; or use a score table, which has no "
        "model.",
        context.memory.facts.name,
        (native.weights + native.embeddings) / 2**20,
    )


def require_live(context: PruningContext) -> LiveContext:
    """Return the context if it has a live model; else raise `ModelNotAvailableError`."""
    if isinstance(context, LiveContext):
        return context
    raise ModelNotAvailableError(
        f"A live model is needed, but the context of {context.memory.facts.name} has only its "
        "scores; open the model itself."
    )


def open_store(name: str | None) -> ScoreStore | None:
    """The score store that `ContextConfig.store` names; None keeps scores in memory.

    Raises:
        StoreError: The file is no score store, is damaged, or has a newer format.
    """
    path = cache_dir() / "scores.sqlite" if name == "default" else name
    return None if path is None else ScoreStore(path)
