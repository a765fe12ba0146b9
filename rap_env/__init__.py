"""Runtime-adaptive pruning of language models: the environments `RAPPrune` and their parts.

Importing this package registers the environments, as soon as gymnasium is imported too, and
loads neither a model nor torch nor gymnasium: a server needs none. The names below are
imported from their modules on first use; everything else is imported from its module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from rap_env.extras import missing_extra
from rap_env.version import __version__

_MODULES = {
    "RAPLadderEnv": "rap_env.envs.ladder",
    "RAPLadderVectorEnv": "rap_env.envs.ladder",
    "RAPPruneEnv": "rap_env.envs.prune",
    "RAPPruneVectorEnv": "rap_env.envs.prune",
    "make_vec": "rap_env.envs.vector",
    "RapError": "rap_env.errors",
    "gsi": "rap_env.importance.gsi_search",
    "evaluate": "rap_env.leaderboard.evaluation",
    "MemoryModel": "rap_env.memory",
    "load_llm": "rap_env.models.files.loading",
    "load_pruned": "rap_env.models.files.pruned_checkpoint",
    "save_pruned": "rap_env.models.files.pruned_checkpoint",
    "Plan": "rap_env.plan",
    "load_policy": "rap_env.policies.loading",
    "Request": "rap_env.request",
    "RuntimeController": "rap_env.runtime.controller",
    "CorpusConfig": "rap_env.scoring.corpus",
    "load_corpus": "rap_env.scoring.corpus_loading",
    "PlanLM": "rap_env.scoring.plan_lm",
    "PlanScorer": "rap_env.scoring.scorer",
}
"""The module of each public name; the stub beside this file has the same ones for type checkers."""

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
    from rap_env.leaderboard.unseen import PARTS, arguments_of

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
    for name in ("RAPAcross-v0", *PARTS):
        gymnasium.register(
            id=name,
            entry_point="rap_env.envs.across:RAPAcrossEnv",
            vector_entry_point="rap_env.envs.across:RAPAcrossVectorEnv",
            kwargs=arguments_of(name) if name in PARTS else {},
        )


class _RegisterAfterImport(MetaPathFinder):
    """Registers the environments right after gymnasium is imported.

    Gymnasium has read no entry points of plugins since version 1.0. Without an import of this
    package, ``gymnasium.make("rap_env:RAPPrune-v0", ...)`` imports it.
    """

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
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"rap_env.{name}") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
