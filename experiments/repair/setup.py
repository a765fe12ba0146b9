"""The live parts of ``experiments.repair``: model, texts, and libraries that are made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from experiments.config import Config, TextConfig
from experiments.contexts import refuse_table
from experiments.errors import ExperimentError
from rap_env.context.base import PruningContext
from rap_env.context.live import LiveContext
from rap_env.context.opening import open_store
from rap_env.importance import GSIProfile, gsi
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.loading import shared_llm
from rap_env.memory import MemoryModel
from rap_env.repair import DistillConfig, FitConfig, StubLibrary, distill, fit_library
from rap_env.repair.masks import MaskDraw
from rap_env.scoring.corpus import Corpus, CorpusConfig, ensure_disjoint, load_corpus
from rap_env.scoring.scorer import MaskScorer
from rap_env.workload import make_sampler

log = logging.getLogger(__name__)

_LEAST_HELD_BACK = 4  # windows of each text
_FEW_HELD_BACK = 64  # windows of all texts together


@dataclass(frozen=True)
class Texts:
    """All text by name; no two of the three kinds share any.

    Attributes:
        fit: To fit on.
        held_back: To choose ranks and penalties on, of the same sources.
        report: To report on.
    """

    fit: Mapping[str, Corpus]
    held_back: Mapping[str, Corpus]
    report: Mapping[str, Corpus]

    def fitted(self, names: list[str]) -> tuple[Corpus, Corpus]:
        """What is fitted on and held back, of some sources together."""
        fit = {name: self.fit[name] for name in names}
        held_back = {name: self.held_back[name] for name in names}
        return Corpus.joined(fit), Corpus.joined(held_back)


class RepairBench:
    """The model with its texts and stub libraries.

    Args:
        config: All settings.
        folder: Where libraries are kept.

    Raises:
        CorpusError: A text is missing, too short, or overlaps with another.
        ExperimentError: There is no text to fit or report on, or no model that can be fitted.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        if not config.stubs.fit_texts or not config.stubs.report_texts:
            raise ExperimentError("stubs.fit_texts and stubs.report_texts need an entry each.")
        if config.repair.name != "none":
            raise ExperimentError(
                f"experiments.repair makes stubs, and compares them with none: leave repair.name "
                f"at 'none', not {config.repair.name!r}."
            )
        if config.model.max_memory_bytes and config.stubs.distill_steps:
            raise ExperimentError(
                "A model under model.max_memory_bytes is read a layer at a time, and distillation "
                "needs gradients through all of them; set stubs.distill_steps=0, or drop the cap."
            )
        refuse_table(config)
        self.config, self.folder = config, folder
        model = config.model
        self.llm = shared_llm(
            model.name,
            device=model.device,
            dtype=model.dtype,
            max_memory_bytes=model.max_memory_bytes,
        )
        self.store = open_store(config.store)
        self.calibration = self._load(config.calibration, "calibration")
        self.texts = self._texts()
        self.report = {
            name: MaskScorer(self.llm, text, self.store) for name, text in self.texts.report.items()
        }

    @property
    def fit_config(self) -> FitConfig:
        """How stubs are fitted."""
        return FitConfig(rank=self.config.stubs.rank)

    @cached_property
    def library(self) -> StubLibrary:
        """Stubs fitted on all texts together."""
        return self.fitted("library", list(self.texts.fit))

    @cached_property
    def distilled(self) -> StubLibrary:
        """The same stubs, distilled; killed, it goes on."""
        path = self.folder / "distilled.safetensors"
        if path.exists():
            return self._found(path)
        text, _ = self.texts.fitted(list(self.texts.fit))
        stubs = self.config.stubs
        settings = DistillConfig(
            steps=stubs.distill_steps,
            windows=stubs.distill_windows,
            learning_rate=stubs.learning_rate,
            seed=self.config.seed,
        )
        unfinished = self.folder / "distilling.pt"
        made = distill(
            self.llm,
            self.library,
            text,
            self._mask_draw(),
            settings,
            path=unfinished,
            progress=self.config.progress,
        )
        self._kept(made, path)
        unfinished.unlink()
        return made

    def fitted(self, label: str, names: list[str], windows: int | None = None) -> StubLibrary:
        """A library fitted on some texts, from its file if it was fitted before.

        Args:
            label: Name of its file.
            names: The texts.
            windows: Windows to fit on, spread over all of them; None for all.
        """
        path = self.folder / f"{label}.safetensors"
        if path.exists():
            return self._found(path)
        text, held_back = self.texts.fitted(names)
        if windows is not None:
            text, held_back = text.spread(windows), self.few_held_back(held_back, windows)
        log.info("Fitting stubs (%s) on %d tokens.", label, text.tokens.numel())
        made = fit_library(
            self.llm, text, held_back, self.fit_config, progress=self.config.progress
        )
        return self._kept(made, path)

    def few_held_back(self, held_back: Corpus, windows: int) -> Corpus:
        """As much held-back text as so many fitted windows need: judging them all takes longer."""
        share = round(self.config.stubs.held_back_share * windows)
        return held_back.spread(min(len(held_back.tokens), max(_FEW_HELD_BACK, share)))

    def stubs_of(self, repair: str) -> StubLibrary | None:
        """The library of a repair; for ``per_mask`` the one whose masks and ranks are taken."""
        if repair == "none":
            return None
        return self.distilled if repair == "distilled" else self.library

    def importance(self, repair: str) -> GSIProfile:
        """The GSI order with the stubs of a repair in place; killed, it goes on."""
        return gsi(
            MaskScorer(self.view(self.stubs_of(repair)), self.calibration, self.store),
            method="lazy",
            stop=self.config.importance.gsi_removals,
            path=self.folder / f"gsi-{repair}.json",
            progress=self.config.progress,
        )

    def context(self, library: StubLibrary | None) -> PruningContext:
        """What a search for masks looks at, with these stubs or none."""
        view = self.view(library)
        return LiveContext(view, self.calibration, self.store, importance="none", progress=False)

    def view(self, library: StubLibrary | None) -> ElasticLLM:
        """The model, with these stubs or none."""
        return self.llm if library is None else library.attach(self.llm)

    def _mask_draw(self) -> MaskDraw:
        """Masks that follow the importance of blocks with stubs, and noisy ones."""
        profile = self.importance("library")
        memory = MemoryModel(self.view(self.library))
        sampler = make_sampler(self.config.workload, memory)
        return MaskDraw(memory, sampler, np.asarray(profile.marginal_loss))

    def _found(self, path: Path) -> StubLibrary:
        library = StubLibrary.load(path)
        library.check(self.llm)
        log.info("Found %s.", path)
        return library

    def _kept(self, library: StubLibrary, path: Path) -> StubLibrary:
        library.save(path)
        size = library.nbytes / len(library.stubs) / 1000
        log.info("Wrote %s: %.0f kB a stub.", path, size)
        return library

    def _texts(self) -> Texts:
        stubs = self.config.stubs
        parts = {name: self._part(text) for name, text in stubs.fit_texts.items()}
        report = self._load_all(stubs.report_texts, "report")
        held_back = self._load_all(parts, "selection")
        fit = self._load_all(stubs.fit_texts, "calibration")
        for text in report.values():
            for other in (*fit.values(), *held_back.values(), self.calibration):
                ensure_disjoint(other, text)
        return Texts(fit, held_back, report)

    def _part(self, text: TextConfig) -> TextConfig:
        windows = round(text.windows * self.config.stubs.held_back_share)
        return replace(text, windows=max(_LEAST_HELD_BACK, windows))

    def _load_all(self, texts: Mapping[str, TextConfig], role: str) -> dict[str, Corpus]:
        """Texts by name. What the model has to write comes last: a bad path is told at once."""
        files_first = sorted(texts.items(), key=lambda item: item[1].source == "self")
        found = {name: self._load(text, role) for name, text in files_first}
        return {name: found[name] for name in texts}

    def _load(self, text: TextConfig, role: str) -> Corpus:
        config = CorpusConfig(**asdict(text), role=role)
        return load_corpus(config, self.llm, progress=self.config.progress)
