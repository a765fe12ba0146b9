"""``python -m experiments.replay``: the same arrivals and budget for each system, measured."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.comparison.records import append_record
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.run_folder import provenance as run_provenance
from experiments.comparison.tables import publish_tables
from experiments.config import Config, ReplayConfig
from experiments.errors import ExperimentError
from experiments.replay.budgets import Budget, make_budget
from experiments.replay.load import Load, make_load
from experiments.replay.quality import QualityJudge
from experiments.replay.rows import ReplayRow, row_key
from experiments.replay.serve import Server
from experiments.replay.summary import judged, make_row, write_details
from experiments.replay.systems import SystemMaker
from experiments.replay.tables import replay_markdown, replay_text
from rap_env.memory import MemoryModel
from rap_env.scoring.corpus import CorpusConfig, load_corpus

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

FILE, REFERENCES, DECISIONS = "replay.jsonl", "references.jsonl", "decisions"

_FREE = ("systems", "figures")
"""Settings of a replay that may change when it goes on."""
_PATHS = ("trace", "text", "data_root", "policy", "frontier", "gsi")
"""Settings that name files; what is in the files goes into the records instead."""


def replay(config: Config, folder: Path) -> Path:
    """Run every system over the same arrivals; one whose row is there is not run again.

    Args:
        config: All settings.
        folder: Where ``replay.jsonl``, the files beside it, tables and figures go.

    Returns:
        The path of ``replay.jsonl``.

    Raises:
        RapError: A setting cannot be, a trace, text, policy or table is missing or damaged, or a
            record is.
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
    """Everything that all systems share: the model, the arrivals, the budget, the judge.

    Args:
        config: All settings.
        folder: The run folder.

    Raises:
        RapError: As `replay`.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._llm = _load(config)
        self._memory = MemoryModel(self._llm)
        self.reference_bytes = self._memory.dense_peak_bytes(*config.replay.reference_shape)
        self.budget: Budget = make_budget(config.budget, self.reference_bytes)
        self.load: Load = make_load(config, self._llm)
        self._maker = SystemMaker(config, self._llm, self.load, self.budget)
        self._maker.check(config.replay.systems)

    def rows(self) -> list[ReplayRow]:
        """A row for each system, in the order of the settings, appended as they are made."""
        path = self._folder / FILE
        found = {row.key: row for row in ReplayRow.read(path)}
        wanted = []
        for name in self._config.replay.systems:
            provenance = self._provenance(name)
            key = row_key(name, provenance)
            if key not in found:
                found[key] = self._run(name, provenance)
                append_record(path, found[key].to_record())
                log.info("%s: %s", name, _in_words(found[key]))
            wanted.append(found[key])
        return wanted

    def _run(self, name: str, provenance: dict[str, Any]) -> ReplayRow:
        decisions = self._folder / DECISIONS / f"{name}.jsonl"
        decisions.unlink(missing_ok=True)  # of a run of this system that was killed
        settings, progress = self._config.replay, self._config.progress
        server = Server(settings, self._llm, self.load, self.budget, decisions)
        served = server.run(name, self._maker, progress=progress)
        self._llm.set_residency("resident")  # judging needs the dense model, and serves nobody
        found = judged(served, self._judge())
        write_details(self._folder, found)
        return make_row(found, self.budget, self._memory, provenance)

    def _judge(self) -> QualityJudge:
        """A new one each time: what it keeps in memory should not be there while others serve."""
        path, progress = self._folder / REFERENCES, self._config.progress
        return QualityJudge(self._llm, self.load, path, self._scorer(), progress=progress)

    def _scorer(self) -> MaskScorer | None:
        """Measures masks on the first windows of the prompts' text."""
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
        """What the row of a system depends on, and what made it."""
        config, facts = self._config, self._memory.facts
        settings = {k: v for k, v in asdict(config.replay).items() if k not in (*_FREE, *_PATHS)}
        budget = {k: Path(v).name if k == "path" else v for k, v in config.budget.items()}
        depends_on = {
            "model": facts.name,
            "model_fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "num_layers": facts.num_layers,
            "load_sha256": self.load.provenance["sha256"],
            "budget": budget,
            "reference_bytes": self.reference_bytes,
            "chooser_sha256": self._maker.source_sha256(name),
            "settings": settings,
        }
        made = run_provenance({"replay": config.seed})
        return {"depends_on": depends_on, "load": self.load.provenance, **made}


def _load(config: Config) -> ElasticLLM:
    from rap_env.llm.loading import load_llm

    return load_llm(config.model.name, device=config.model.device, dtype=config.model.dtype)


def _in_words(row: ReplayRow) -> str:
    return (
        f"{row.served} of {row.requests} requests served in {row.duration_s:.0f} s "
        f"({row.busy_s:.0f} s of work), {row.violations} violations of the budget"
    )


def _draw(folder: Path) -> None:
    """The figures, where matplotlib is there."""
    try:
        import matplotlib  # noqa: F401 - an extra of the package
    except ImportError:
        log.info("No figures are drawn: matplotlib comes with `pip install 'rap-env[plots]'`.")
        return
    from experiments.replay.figures import draw_all

    draw_all(folder, folder / "figures")
