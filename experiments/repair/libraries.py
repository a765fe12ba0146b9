"""The parts of ``experiments.repair``: model, texts, and stub libraries that are made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.contexts import build_context, load_texts
from experiments.study.errors import ExperimentError
from rap_env.context.live import LiveContext
from rap_env.importance.gsi_search import gsi
from rap_env.models.live.elastic import ElasticLLM
from rap_env.repair.config import DistillConfig, FitConfig
from rap_env.repair.distilling import MaskSampler, distill
from rap_env.repair.fitting import fit_library
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.corpus import Corpus, ensure_disjoint
from rap_env.scoring.scorer import MaskScorer
from rap_env.workload import make_sampler

log = logging.getLogger(__name__)

_MIN_HELD_BACK = 4  # windows of each text
_MIN_SUBSET = 64  # windows of all texts together


@dataclass(frozen=True)
class Texts:
    """All texts by name; the three kinds are disjoint.

    Attributes:
        fit: Texts that stubs are fitted on.
        held_back: Texts of the same sources that ranks and penalties are chosen on.
        report: Texts that results are reported on.
    """

    fit: Mapping[str, Corpus]
    held_back: Mapping[str, Corpus]
    report: Mapping[str, Corpus]

    def fitted(self, names: list[str]) -> tuple[Corpus, Corpus]:
        """Join the fitted texts of some sources, and their held-back texts."""
        fit = {name: self.fit[name] for name in names}
        held_back = {name: self.held_back[name] for name in names}
        return Corpus.joined(fit), Corpus.joined(held_back)


class StubLibraries:
    """Fits, distils and loads the stub libraries of a run, for one model and its texts.

    Attributes:
        context: The model without stubs, its calibration text and score store.
        texts: The other texts.
        report: A scorer of the model without stubs for each report text.

    Raises:
        CorpusError: A text is missing, too short, or overlaps with another.
        ExperimentError: No text to fit or report on is given, or the model cannot be fitted.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        if not config.stubs.fit_texts or not config.stubs.report_texts:
            raise ExperimentError("stubs.fit_texts and stubs.report_texts need an entry each.")
        if config.repair["name"] != "none":
            raise ExperimentError(
                f"experiments.repair fits stubs itself and compares them with none: leave "
                f"repair.name at 'none', not {config.repair['name']!r}."
            )
        if config.model.max_memory_bytes and config.stubs.distill_steps:
            raise ExperimentError(
                "With model.max_memory_bytes the model is read one layer at a time, but "
                "distillation needs gradients through all layers; set stubs.distill_steps=0, or "
                "remove the cap."
            )
        self.config, self.folder = config, folder
        self.context = build_context(config, profiled=False)
        self.llm = self.context.llm
        self.texts = self._load_texts()
        self.report = {
            name: MaskScorer(self.llm, text, self.context.store)
            for name, text in self.texts.report.items()
        }

    @property
    def fit_config(self) -> FitConfig:
        """Settings of the fit."""
        return FitConfig(rank=self.config.stubs.rank)

    @cached_property
    def library(self) -> StubLibrary:
        """Stubs fitted on all texts together."""
        return self.fitted("library", list(self.texts.fit))

    @cached_property
    def distilled(self) -> StubLibrary:
        """The same stubs, distilled."""
        path = self.folder / "distilled.safetensors"
        if path.exists():
            return self._load(path)
        text, _ = self.texts.fitted(list(self.texts.fit))
        stubs = self.config.stubs
        settings = DistillConfig(
            steps=stubs.distill_steps,
            windows=stubs.distill_windows,
            learning_rate=stubs.learning_rate,
            seed=self.config.seed,
        )
        made = distill(
            self.llm, self.library, text, self._mask_draw(), settings, progress=self.config.progress
        )
        return self._save(made, path)

    def fitted(self, label: str, names: list[str], windows: int | None = None) -> StubLibrary:
        """Return a library fitted on some texts; it is read from its file if that exists.

        With `windows` it is fitted on so many windows, spread over all of the texts.
        """
        path = self.folder / f"{label}.safetensors"
        if path.exists():
            return self._load(path)
        text, held_back = self.texts.fitted(names)
        if windows is not None:
            text, held_back = text.spread(windows), self.held_back_subset(held_back, windows)
        log.info("Fitting stubs (%s) on %d tokens.", label, text.tokens.numel())
        made = fit_library(
            self.llm, text, held_back, self.fit_config, progress=self.config.progress
        )
        return self._save(made, path)

    def held_back_subset(self, held_back: Corpus, windows: int) -> Corpus:
        """Return as much held-back text as `windows` fitted windows need, to save time."""
        share = round(self.config.stubs.held_back_share * windows)
        return held_back.spread(min(len(held_back.tokens), max(_MIN_SUBSET, share)))

    def stubs_of(self, repair: str) -> StubLibrary | None:
        """Return the library of a repair."""
        if repair == "none":
            return None
        return self.distilled if repair == "distilled" else self.library

    def context_with(self, library: StubLibrary | None) -> LiveContext:
        """Return the context of the model with these stubs or none, for a search for masks."""
        own = self.context
        return LiveContext(
            self.view(library), own.corpus, own.store, importance="none", progress=False
        )

    def view(self, library: StubLibrary | None) -> ElasticLLM:
        """Return the model with these stubs or none."""
        return self.llm if library is None else library.attach(self.llm)

    def _mask_draw(self) -> MaskSampler:
        """Return a sampler of masks that follow the importance with stubs, with noise."""
        context = self.context_with(self.library)
        profile = gsi(
            context.scorer,
            method="lazy",
            stop=self.config.importance["gsi_removals"],
            path=self.folder / "gsi-library.json",
            progress=self.config.progress,
        )
        memory = context.memory
        sampler = make_sampler(self.config.workload, memory)
        return MaskSampler(memory, sampler, np.asarray(profile.marginal_delta_nll))

    def _load(self, path: Path) -> StubLibrary:
        library = StubLibrary.load(path)
        library.check(self.llm)
        log.info("Loaded %s.", path)
        return library

    def _save(self, library: StubLibrary, path: Path) -> StubLibrary:
        library.save(path)
        size = library.nbytes / len(library.stubs) / 1000
        log.info("Wrote %s: %.0f kB per stub.", path, size)
        return library

    def _load_texts(self) -> Texts:
        stubs, progress = self.config.stubs, self.config.progress
        parts = {name: self._held_back_part(text) for name, text in stubs.fit_texts.items()}
        report = load_texts(stubs.report_texts, "report", self.llm, progress=progress)
        held_back = load_texts(parts, "selection", self.llm, progress=progress)
        fit = load_texts(stubs.fit_texts, "calibration", self.llm, progress=progress)
        for text in report.values():
            for other in (*fit.values(), *held_back.values(), self.context.corpus):
                ensure_disjoint(other, text)
        return Texts(fit, held_back, report)

    def _held_back_part(self, text: TextConfig) -> TextConfig:
        windows = round(text.windows * self.config.stubs.held_back_share)
        return replace(text, windows=max(_MIN_HELD_BACK, windows))
