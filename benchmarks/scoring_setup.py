"""Shared parts of the scoring benchmarks: the model, the text, and the naive loop."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.harness import ModelSettings, open_model
from benchmarks.naive_scorer import serve
from rap_env.blocks import BlockMask
from rap_env.models.files.sources import locate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus


@dataclass
class ScoringSettings(ModelSettings):
    """Settings of the scoring benchmarks."""

    windows: int = 8
    window_tokens: int = 128


@dataclass(frozen=True)
class ScoringSetup:
    """A model and a text."""

    llm: ElasticLLM
    corpus: Corpus
    settings: ScoringSettings

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(self.llm.device)


def open_setup(settings: ScoringSettings) -> ScoringSetup:
    """Load the model and the text, and set torch's threads."""
    llm = open_model(settings)
    text = CorpusConfig(windows=settings.windows, window_tokens=settings.window_tokens)
    return ScoringSetup(llm, load_corpus(text, llm), settings)


NaiveLoop = Callable[[BlockMask], tuple[float, float]]
"""The naive loop in a process of its own: returns seconds and NLL of a mask."""


@contextlib.contextmanager
def naive_loop(setup: ScoringSetup, *, keep_freed_memory: bool = False) -> Iterator[NaiveLoop]:
    """A process with a plain model of the same weights, dtype, text and threads.

    Its C library returns freed memory unless `keep_freed_memory`; this project's keeps it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    model = (
        os.fspath(locate(setup.settings.model).folder),
        str(setup.llm.dtype).removeprefix("torch."),
        setup.device,
        setup.corpus.tokens.tolist(),
    )
    arguments = (theirs, torch.get_num_threads(), keep_freed_memory, *model)
    process = context.Process(target=serve, args=arguments, daemon=True)

    def score(mask: BlockMask) -> tuple[float, float]:
        ours.send(list(mask))
        answer: tuple[float, float] = ours.recv()
        return answer

    process.start()
    try:
        theirs.close()
        ours.recv()
        yield score
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(timeout=10)
        process.kill()
