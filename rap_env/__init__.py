"""Runtime-adaptive pruning of language models: the environments `RAPPrune` and their parts.

Importing this package registers the environments, as soon as gymnasium is imported too, and loads
neither a model nor torch nor gymnasium: a server needs none. The names below are imported from
their modules on first use; everything else is imported from its module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rap_env.extras import missing_extra
from rap_env.version import __version__

if TYPE_CHECKING:
    from rap_env.envs.ladder import RAPLadderEnv as RAPLadderEnv
    from rap_env.envs.ladder import RAPLadderVectorEnv as RAPLadderVectorEnv
    from rap_env.envs.prune import RAPPruneEnv as RAPPruneEnv
    from rap_env.envs.prune import RAPPruneVectorEnv as RAPPruneVectorEnv
    from rap_env.envs.vector import make_vec as make_vec
    from rap_env.errors import RapError as RapError
    from rap_env.importance.gsi_search import gsi as gsi
    from rap_env.leaderboard.evaluation import evaluate as evaluate
    from rap_env.memory import MemoryModel as MemoryModel
    from rap_env.models.files.loading import load_llm as load_llm
    from rap_env.models.files.pruned_checkpoint import load_pruned as load_pruned
    from rap_env.models.files.pruned_checkpoint import save_pruned as save_pruned
    from rap_env.models.files.streamed import stream_llm as stream_llm
    from rap_env.plan import Plan as Plan
    from rap_env.policies.loading import load_policy as load_policy
    from rap_env.repair.cached_library import open_library as open_library
    from rap_env.request import Request as Request
    from rap_env.runtime.controller import RuntimeController as RuntimeController
    from rap_env.scoring.corpus import CorpusConfig as CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus as load_corpus
    from rap_env.scoring.scorer import MaskScorer as MaskScorer

_MODULES = {
    "Plan": "plan",
    "CorpusConfig": "scoring.corpus",
    "MaskScorer": "scoring.scorer",
    "MemoryModel": "memory",
    "RAPPruneEnv": "envs.prune",
    "RAPLadderEnv": "envs.ladder",
    "RAPLadderVectorEnv": "envs.ladder",
    "RAPPruneVectorEnv": "envs.prune",
    "RapError": "errors",
    "Request": "request",
    "RuntimeController": "runtime.controller",
    "evaluate": "leaderboard.evaluation",
    "gsi": "importance.gsi_search",
    "load_corpus": "scoring.corpus_loading",
    "load_llm": "models.files.loading",
    "load_policy": "policies.loading",
    "load_pruned": "models.files.pruned_checkpoint",
    "make_vec": "envs.vector",
    "open_library": "repair.cached_library",
    "save_pruned": "models.files.pruned_checkpoint",
    "stream_llm": "models.files.streamed",
}
"""The module of each public name."""

__all__ = [*_MODULES, "__version__"]

_ENTRY_POINTS = {
    "RAPPrune-v0": ("rap_env.envs.prune:RAPPruneEnv", "rap_env.envs.prune:RAPPruneVectorEnv"),
    "RAPLadder-v0": (
        "rap_env.envs.ladder:RAPLadderEnv",
        "rap_env.envs.ladder:RAPLadderVectorEnv",
    ),
}


def _register() -> None:
    """Register the environments, then the pinned tasks, which fix their arguments."""
    import gymnasium

    from rap_env.leaderboard.tasks import pinned_tasks

    if "RAPPrune-v0" in gymnasium.registry:
        return
    for name, (single, vector) in _ENTRY_POINTS.items():
        gymnasium.register(id=name, entry_point=single, vector_entry_point=vector)
    for task in pinned_tasks().values():
        single, vector = _ENTRY_POINTS[task.environment]
        gymnasium.register(
            id=task.name,
            entry_point=single,
            vector_entry_point=vector,
            reward_threshold=task.reward_threshold,
            kwargs=dict(task.arguments),
        )


class _RegisterAfterImport(MetaPathFinder):
    """Registers the environments right after gymnasium is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Gymnasium's own spec, whose loader registers the environments at the end."""
        spec = PathFinder.find_spec(name, path, target) if name == "gymnasium" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        vars(spec.loader)["exec_module"] = execute_and_register
        return spec


if "gymnasium" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"rap_env.{name}") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
