"""Real contexts around tiny random models: all that an environment needs, in milliseconds."""

from pathlib import Path
from typing import Any

import torch

from rap_env.context.base import ContextConfig, PruningContext
from rap_env.context.live import LiveContext
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import Corpus
from tests.tiny import VOCAB_SIZE, tiny_llm

LAYERS = 3


def tiny_tokens(seed: int = 0, windows: int = 2, length: int = 8) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of_tokens(torch.randint(3, VOCAB_SIZE, (windows, length), generator=generator))


def live_context(
    llm: ElasticLLM, text: Corpus, *, folder: Path | None = None, **settings: Any
) -> LiveContext:
    """A context of settings that `ContextConfig` has; GSI orders all blocks unless they say."""
    config = ContextConfig(**{"gsi_removals": None, **settings})
    return LiveContext(llm, text, config, folder=folder, progress=False)


def make_context(tokenizer: Any = None, *, importance: str = "one_shot") -> PruningContext:
    torch.set_num_threads(1)
    llm = tiny_llm(layers=LAYERS, tokenizer=tokenizer)
    return live_context(llm, tiny_tokens(), importance=importance)


def make_ladder_context(length: int = 128, **settings: Any) -> LiveContext:
    """A tiny model with a text that is longer than its windows, so that all levels differ."""
    torch.set_num_threads(1)
    llm, text = tiny_llm(layers=LAYERS, positions=512), tiny_tokens(windows=2, length=length)
    return live_context(llm, text, **{"importance": "one_shot", **settings})
