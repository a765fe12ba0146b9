"""Runtime-adaptive pruning of language models: `RAPPrune-v0` and its parts.

Importing this package registers the environment and loads neither a model nor torch; the
names below are imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.blocks import Block, BlockMask
    from rap_env.context.base import ContextConfig, PruningContext
    from rap_env.context.opening import open_context
    from rap_env.envs.prune import RAPPruneEnv
    from rap_env.envs.vector import RAPPruneVectorEnv
    from rap_env.errors import RapError
    from rap_env.importance import GSIProfile, OneShotProfile, gsi, one_shot
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.live_batch import LiveBatch
    from rap_env.llm.loading import load_llm, shared_llm
    from rap_env.llm.streamed import stream_llm
    from rap_env.llm.surgery import load_pruned, save_pruned
    from rap_env.memory import MemoryModel
    from rap_env.observation import ObservationBuilder
    from rap_env.repair import StubLibrary, fit_library, open_library
    from rap_env.request import Request
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.policies import load_policy
    from rap_env.scoring.corpus import Corpus, CorpusConfig, load_corpus
    from rap_env.scoring.scorer import MaskScorer
    from rap_env.scoring.store import ScoreStore
    from rap_env.scoring.tasks import TaskConfig, TaskScorer
    from rap_env.workload import make_sampler

_MODULES = {
    "Block": "blocks",
    "BlockMask": "blocks",
    "Corpus": "scoring.corpus",
    "CorpusConfig": "scoring.corpus",
    "ElasticLLM": "llm.elastic",
    "Engine": "runtime.engine",
    "GSIProfile": "importance",
    "LiveBatch": "llm.live_batch",
    "MaskScorer": "scoring.scorer",
    "MemoryModel": "memory",
    "ObservationBuilder": "observation",
    "OneShotProfile": "importance",
    "RAPPruneEnv": "envs.prune",
    "RAPPruneVectorEnv": "envs.vector",
    "RapError": "errors",
    "Request": "request",
    "RuntimeController": "runtime.controller",
    "ScoreStore": "scoring.store",
    "StubLibrary": "repair",
    "TaskConfig": "scoring.tasks",
    "TaskScorer": "scoring.tasks",
    "PruningContext": "context",
    "ContextConfig": "context",
    "fit_library": "repair",
    "gsi": "importance",
    "load_corpus": "scoring.corpus",
    "load_llm": "llm.loading",
    "load_policy": "runtime.policies",
    "load_pruned": "llm.surgery",
    "make_sampler": "workload",
    "one_shot": "importance",
    "open_library": "repair",
    "open_context": "context",
    "save_pruned": "llm.surgery",
    "shared_llm": "llm.loading",
    "stream_llm": "llm.streamed",
}

__all__ = [
    "Block",
    "BlockMask",
    "ContextConfig",
    "Corpus",
    "CorpusConfig",
    "ElasticLLM",
    "Engine",
    "GSIProfile",
    "LiveBatch",
    "MaskScorer",
    "MemoryModel",
    "ObservationBuilder",
    "OneShotProfile",
    "PruningContext",
    "RAPPruneEnv",
    "RAPPruneVectorEnv",
    "RapError",
    "Request",
    "RuntimeController",
    "ScoreStore",
    "StubLibrary",
    "TaskConfig",
    "TaskScorer",
    "__version__",
    "fit_library",
    "gsi",
    "load_corpus",
    "load_llm",
    "load_policy",
    "load_pruned",
    "make_sampler",
    "one_shot",
    "open_context",
    "open_library",
    "save_pruned",
    "shared_llm",
    "stream_llm",
]

if "RAPPrune-v0" not in gymnasium.registry:
    gymnasium.register(
        id="RAPPrune-v0",
        entry_point="rap_env.envs.prune:RAPPruneEnv",
        vector_entry_point="rap_env.envs.vector:RAPPruneVectorEnv",
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
