"""One place where a model, its text, its scores and its importance come together.

Everything above (environments, agents, baselines, experiments) takes a context, so that
all of them measure the same masks on the same text and share one model and one score store.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rap_env.artifacts import canonical_json, digest
from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.paths import cache_dir
from rap_env.repair import REPAIRS
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.score_table import table_path
from rap_env.scoring.store import ScoreStore

if TYPE_CHECKING:  # a context without a live model loads no torch
    import numpy as np
    import numpy.typing as npt

    from rap_env.importance import Frontier, GSIProfile, ImportanceFeatures, OneShotProfile
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.scoring.corpus import Corpus

log = logging.getLogger(__name__)

IMPORTANCES = ("gsi", "one_shot", "none")
"""What agents may see of the importance; any other word is the path of a GSI artifact."""


@dataclass(frozen=True)
class ContextConfig:
    """What to measure with. Plain values, so that it can be a key and go into records.

    Attributes:
        model: Alias, hub id, folder or GGUF file; or ``"score_table:PATH"``, which has scores
            and no model (see `rap_env.context.table`).
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` ...
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` ...
        max_memory_bytes: Memory cap under which layers are read from files one at a time (see
            `rap_env.stream_llm`); None loads the model as a whole.
        calibration: The text that masks are searched on.
        importance: ``"gsi"`` (measured once, then kept), ``"one_shot"`` (2L evaluations),
            ``"none"``, or the path of a GSI artifact.
        gsi_removals: Removals after which GSI stops; None orders all blocks.
        gsi_method: ``"exact"``, ``"lazy"`` or ``"halving"``, see `rap_env.importance.gsi`.
        repair: What stands in the place of removed blocks: ``"none"``; ``"library"``, stubs that
            are fitted on self-written text at the first use and kept; or the path of a library's
            file (see `rap_env.repair.open_library`).
        frontier: Path of a frontier artifact (`rap_env.importance.build_frontier`), for what asks
            for the best known masks; None where nothing does.
        store: ``"default"`` (in the cache), a path, or None to keep scores in memory.
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    max_memory_bytes: int | None = None
    calibration: CorpusConfig = field(default_factory=CorpusConfig)
    importance: str = "gsi"
    gsi_removals: int | None = 16
    gsi_method: str = "exact"
    repair: str = "none"
    frontier: str | None = None
    store: str | None = "default"


class PruningContext:
    """A live model with its memory arithmetic, scorer and importance; parts come when asked for.

    Args:
        llm: The live model; a repaired view of one (`StubLibrary.attach`) will do.
        calibration: The text that masks are searched on.
        store: Where scores are kept; None keeps them in memory.
        importance: As in `ContextConfig`.
        gsi_removals: As in `ContextConfig`.
        gsi_method: As in `ContextConfig`.
        frontier: As in `ContextConfig`.
        folder: Where importance artifacts are kept; None keeps them in memory.
        progress: Whether long measurements draw progress bars.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        calibration: Corpus,
        store: ScoreStore | None = None,
        *,
        importance: str = "gsi",
        gsi_removals: int | None = None,
        gsi_method: str = "exact",
        frontier: str | None = None,
        folder: Path | None = None,
        progress: bool = True,
    ) -> None:
        from rap_env.scoring.scorer import MaskScorer

        self._llm = llm
        self.store = store
        self.memory = MemoryModel(llm)
        self.scorer = MaskScorer(llm, calibration, store)
        self._importance = importance
        self._gsi_removals = gsi_removals
        self._gsi_method = gsi_method
        self.frontier_path = frontier
        self._folder = folder
        self._progress = progress

    @property
    def llm(self) -> ElasticLLM:
        """The live model."""
        return self._llm

    @cached_property
    def one_shot(self) -> OneShotProfile:
        """One-shot importance of every block, measured on first use."""
        from rap_env.importance import OneShotProfile, one_shot

        path = self._artifact("one_shot")
        if path is not None and path.exists():
            return OneShotProfile.load(path, self.llm)
        profile = one_shot(self.scorer, progress=self._progress)
        if path is not None:
            profile.save(path)
        return profile

    @cached_property
    def layer_influence(self) -> npt.NDArray[np.float64]:
        """Block influence of each whole layer, shape (L,); one forward pass, on first use."""
        from rap_env.importance.layers import layer_influence

        return layer_influence(self.llm, self.scorer.batches)

    @cached_property
    def gsi(self) -> GSIProfile:
        """The GSI order, measured on first use (minutes) and kept."""
        from rap_env.importance import GSIProfile, gsi

        if self._importance not in IMPORTANCES:
            return GSIProfile.load(self._importance, self.llm)
        # What an agent observes depends on how far GSI went and on how, so each has its own file.
        path = self._artifact(f"gsi-{self._gsi_method}-{self._gsi_removals or 'all'}")
        if path is None or not path.exists():
            log.info("Measuring GSI on %s; this takes minutes, once.", self.llm.name)
        return gsi(
            self.scorer,
            method=self._gsi_method,
            stop=self._gsi_removals,
            path=path,
            progress=self._progress,
        )

    @cached_property
    def frontier(self) -> Frontier:
        """The best known mask for each pair of counts of removed blocks.

        Raises:
            ArtifactError: None was given, or it is damaged or of another model.
        """
        from rap_env.importance import Frontier

        path = self.frontier_path
        if path is None or not Path(path).exists():
            raise ArtifactError(
                f"There is no frontier table ({path or 'no path was given'}); build one with "
                "`python -m experiments.profile frontier.evaluations=3000`."
            )
        return Frontier.load(path, self.memory)

    @cached_property
    def features(self) -> ImportanceFeatures:
        """What an agent sees of the importance scores."""
        from rap_env.features import ImportanceFeatures

        if self._importance == "none":
            return ImportanceFeatures.none(self.memory.facts.num_blocks)
        if self._importance == "one_shot":
            return ImportanceFeatures.from_one_shot(self.one_shot.loss_rise)
        return ImportanceFeatures(self.gsi.first_pass, self.gsi.rank, self.gsi.marginal_loss)

    def _artifact(self, name: str) -> Path | None:
        """A file of its own for each model, text and way of measuring."""
        key = digest(dict(self.scorer.context))[:24]
        return None if self._folder is None else self._folder / f"{name}-{key}.json"


_open: dict[str, PruningContext] = {}


def open_context(config: ContextConfig) -> PruningContext:
    """The context for a config; one for each config in a process.

    Raises:
        RapError: As loading the model, the text, the stubs, the store, a table or an artifact does.
    """
    key, table = canonical_json(asdict(config)), table_path(config.model)
    library = None if config.repair in REPAIRS else Path(config.repair).expanduser()
    for made in (table, library):
        if made is not None and made.exists():
            key += f" {made.stat().st_mtime_ns}"  # one that was made again is another one
    if key not in _open:
        _open[key] = _opened(config, table)
    return _open[key]


def open_store(name: str | None) -> ScoreStore | None:
    """The score store that `ContextConfig.store` names; None keeps scores in memory.

    Raises:
        StoreError: The file is no score store, is damaged, or is of a newer format.
    """
    path = cache_dir() / "scores.sqlite" if name == "default" else name
    return None if path is None else ScoreStore(path)


def _opened(config: ContextConfig, table: Path | None) -> PruningContext:
    if table is not None:
        from rap_env.context.table import open_table

        return open_table(table, config)
    from rap_env.llm.loading import shared_llm
    from rap_env.scoring.corpus import load_corpus

    llm = shared_llm(
        config.model,
        device=config.device,
        dtype=config.dtype,
        max_memory_bytes=config.max_memory_bytes,
    )
    if config.repair != "none":
        from rap_env.repair import open_library

        llm = open_library(config.repair, llm).attach(llm)  # the shared model stays as it is
    return PruningContext(
        llm,
        load_corpus(config.calibration, llm),
        open_store(config.store),
        importance=config.importance,
        gsi_removals=config.gsi_removals,
        gsi_method=config.gsi_method,
        frontier=config.frontier,
        folder=cache_dir() / "importance",
    )
