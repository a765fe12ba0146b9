"""``python -m experiments.replay``: measure several systems on the same arrivals and budget."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Config
from experiments.config.serving import ReplayConfig
from experiments.errors import ExperimentError
from experiments.replay.budgets import Budget, make_budget
from experiments.replay.harness import ReplayHarness
from experiments.replay.outcomes import evaluate_outputs, make_row, write_details
from experiments.replay.quality import QualityEvaluator
from experiments.replay.records import ReplayRow
from experiments.replay.systems import SystemFactory
from experiments.replay.tables import replay_markdown, replay_text
from experiments.replay.workload import Workload, make_workload
from experiments.study.records import RowFile, row_key
from experiments.study.run_folder import RunFolder
from experiments.study.run_folder import provenance as run_provenance
from experiments.study.tables import publish_tables
from rap_env.memory import MemoryModel
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

FILE, REFERENCES, DECISIONS = "replay.jsonl", "references.jsonl", "decisions"

_FREE = ("systems", "figures")
"""Settings that may change when a replay is resumed."""
_PATHS = ("trace", "text", "data_root", "policy", "knapsack", "frontier", "gsi")
"""Settings that name files; records hold hashes of their content instead."""


def replay(config: Config, folder: Path) -> Path:
    """Run every system on the same workload; systems with a row already are not run again.

    Returns:
        The path of ``replay.jsonl``.
    """
    if not config.budget:
        raise ExperimentError(
            "A replay needs a budget: budget=cotenants, or another file of conf/budget."
        )
    names = [f.name for f in fields(ReplayConfig) if f.name not in _FREE]
    frozen = ("model", "budget", "calibration", "seed", *(f"replay.{name}" for name in names))
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=frozen)
    rows = Replay(config, folder).rows()
    run.finish(started, rows=len(rows))
    publish_tables(folder, replay_markdown(rows), replay_text(rows))
    if config.replay.figures:
        _draw(folder)
    return folder / FILE


class Replay:
    """What all systems share: model, workload and budget."""

    def __init__(self, config: Config, folder: Path) -> None:
        from rap_env.models.files.loading import load_llm

        self._config = config
        self._folder = folder
        model = config.model
        self._llm = load_llm(
            model.name, device=model.device, dtype=model.dtype, weights=model.weights
        )
        self._memory = MemoryModel(self._llm)
        self.reference_bytes = self._memory.dense_peak_bytes(*config.replay.reference_shape)
        self.budget: Budget = make_budget(config.budget, self.reference_bytes)
        self.workload: Workload = make_workload(config, self._llm)
        self._factory = SystemFactory(config, self._llm, self.workload, self.budget)
        self._factory.check(config.replay.systems)

    def rows(self) -> list[ReplayRow]:
        """Return a row for each system, in the order of the settings; new rows are appended."""
        file = RowFile(self._folder / FILE, ReplayRow)
        rows = []
        for name in self._config.replay.systems:
            provenance = self._provenance(name)
            rows.append(file.get(row_key(name, provenance), partial(self._run, name, provenance)))
        return rows

    def _run(self, name: str, provenance: dict[str, Any]) -> ReplayRow:
        decisions = self._folder / DECISIONS / f"{name}.jsonl"
        decisions.unlink(missing_ok=True)  # left by an interrupted run of this system
        settings, progress = self._config.replay, self._config.progress
        harness = ReplayHarness(settings, self._llm, self.workload, self.budget, decisions)
        run = harness.run(name, self._factory, progress=progress)
        self._llm.set_residency("resident")  # the evaluation needs the dense model
        # A new evaluator for each system: its memory must not count while the next system runs.
        evaluator = QualityEvaluator(
            self._llm,
            self.workload,
            self._folder / REFERENCES,
            self._scorer(),
            progress=progress,
        )
        qualities, mask_delta_nll = evaluate_outputs(run, evaluator)
        write_details(self._folder, run, qualities)
        row = make_row(run, qualities, mask_delta_nll, self.budget, self._memory, provenance)
        log.info(
            "%s: %d of %d requests served in %.0f s (%.0f s of work), %d violations of the budget",
            name, row.served, row.requests, row.duration_s, row.busy_s, row.violations,
        )  # fmt: skip
        return row

    def _scorer(self) -> MaskScorer | None:
        """Return a scorer on the first windows of the prompts' text; None if none is wanted."""
        from rap_env.context.opening import open_store
        from rap_env.scoring.scorer import MaskScorer

        settings = self._config.replay
        if not settings.mask_loss_windows:
            return None
        text = CorpusConfig(**asdict(settings.text), role="report")
        corpus = load_corpus(text, self._llm, progress=self._config.progress)
        windows = min(settings.mask_loss_windows, len(corpus.tokens))
        return MaskScorer(self._llm, corpus.spread(windows), open_store(self._config.store))

    def _provenance(self, name: str) -> dict[str, Any]:
        """Describe what the row of a system depends on, and what made it."""
        config, facts = self._config, self._memory.facts
        settings = {k: v for k, v in asdict(config.replay).items() if k not in (*_FREE, *_PATHS)}
        budget = {k: Path(v).name if k == "path" else v for k, v in config.budget.items()}
        depends_on = {
            "model": facts.name,
            "model_fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "num_layers": facts.num_layers,
            "load_sha256": self.workload.provenance["sha256"],
            "budget": budget,
            "reference_bytes": self.reference_bytes,
            "chooser_sha256": self._factory.source_sha256(name),
            "settings": settings,
        }
        made = run_provenance({"replay": config.seed})
        return {"depends_on": depends_on, "load": self.workload.provenance, **made}


def _draw(folder: Path) -> None:
    """Draw the figures, if matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401 - an extra of the package
    except ImportError:
        log.info("No figures: matplotlib is not installed (`pip install 'rap-env[plots]'`).")
        return
    from experiments.replay.figures import draw_all

    draw_all(folder, folder / "figures")
