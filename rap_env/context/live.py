"""The context of a live model: it measures scores and importance on first use."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import digest
from rap_env.context.base import IMPORTANCES, ContextConfig, PruningContext
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_costs import LevelCosts, prepared_costs
from rap_env.importance.profiles import GSIProfile, OneShotProfile, Profile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.store import ScoreStore

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

ProfileT = TypeVar("ProfileT", bound=Profile)

_PACKAGED = Path(__file__).parents[1] / "policies" / "packaged"

PACKAGED_COSTS = _PACKAGED / "smollm2-135m.levels.json"
"""Costs of the levels of the default model, measured on text that it wrote."""

PACKAGED_ORDERS = tuple(sorted(_PACKAGED.glob("*.gsi*.json")))
"""GSI orders of the default model with default settings, on text that it wrote; one a
dtype."""


class LiveContext(PruningContext):
    """A live model with its memory arithmetic, scorer and importance.

    Args:
        llm: The live model.
        calibration: The text that plans are searched on.
        config: How importance is measured, and the frontier.
        store: Where scores are stored; None keeps them in memory.
        folder: Where importance artifacts are cached; None keeps them in memory.
        progress: Whether long measurements show progress bars.
        reopen: Opens the same context, in the place of a pickle; None if it has no pickle.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        calibration: Corpus,
        config: ContextConfig,
        store: ScoreStore | None = None,
        *,
        folder: Path | None = None,
        progress: bool = True,
        reopen: Callable[[], PruningContext] | None = None,
    ) -> None:
        from rap_env.scoring.scorer import PlanScorer

        self.store = store
        self.memory = MemoryModel(llm)
        self.scorer: PlanScorer = PlanScorer(llm, calibration, store)
        self.frontier_path = config.frontier
        self.importance = config.importance
        self._gsi_removals = config.gsi_removals
        self._gsi_method = config.gsi_method
        self._folder = folder
        self._progress = progress
        self._level_costs: dict[tuple[str, ...], LevelCosts] = {}
        self._reopen = reopen

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reopen is None:
            raise pickle.PicklingError(
                f"The context of {self.llm.name} was made from a live model in memory, which has "
                "no pickle; open it with rap_env.context.opening.open_context(ContextConfig(...)), "
                "or make the environment by the model's name."
            )
        return self._reopen, ()

    @property
    def llm(self) -> ElasticLLM:
        """The live model."""
        return self.scorer.llm

    @property
    def corpus(self) -> Corpus:
        """The calibration text."""
        return self.scorer.corpus

    @cached_property
    def one_shot(self) -> OneShotProfile:
        """One-shot importance of every block, measured on first use."""
        from rap_env.importance.one_shot import one_shot

        def measure() -> OneShotProfile:
            return one_shot(self.scorer, progress=self._progress)

        return self._cached("one_shot", OneShotProfile, measure)

    def _block_gsi(self) -> GSIProfile:
        """The order in the package for default settings, else measured (minutes) and cached."""
        return self._packaged_gsi() or self._measured_gsi("gsi")

    @cached_property
    def layer_influence(self) -> npt.NDArray[np.float64]:
        """Block influence of each whole layer, shape (L,); one forward pass, on first use."""
        from rap_env.importance.one_shot import layer_influence

        return layer_influence(self.llm, self.scorer.batches)

    def level_costs(self, ladder: Ladder) -> LevelCosts:
        """Costs of levels by gradient: `_earlier_costs` with all levels of a ladder, or new ones.

        New ones are of all weights and of the ladder's caches. They are made on the
        calibration text on first use, and cached.
        """
        for costs in self._earlier_costs:
            with contextlib.suppress(UnknownNameError):
                for item in ladder.items:
                    for level in item.levels[1:]:
                        costs.cost(item.name, level)
                return costs
        key = ladder.cache_levels
        if key not in self._level_costs:
            self._level_costs[key] = self._gradient_costs(key)
        return self._level_costs[key]

    def item_gsi(self, ladder_bytes: LadderBytes) -> GSIProfile:
        """GSI over the items of a ladder, measured on first use and cached.

        Raises:
            UnknownNameError: There is no such method over items.
            ArtifactError: The artifact that ``importance`` names is of another model or
                ladder.
        """
        ladder = ladder_bytes.ladder
        if self.importance not in IMPORTANCES:
            return GSIProfile.load(self.importance, self.llm)
        key = digest([[item.name, item.levels] for item in ladder.items] + [ladder.together])[:8]
        costs = self.level_costs(ladder)
        return self._measured_gsi("item-gsi", f"-{key}", ladder_bytes, costs)

    def _measured_gsi(
        self,
        name: str,
        key: str = "",
        ladder_bytes: LadderBytes | None = None,
        costs: LevelCosts | None = None,
    ) -> GSIProfile:
        """An order, which is continued if a measurement was interrupted."""
        from rap_env.importance.gsi_search import gsi

        # What an agent observes depends on how far and how GSI ran, so each has its own file.
        path = self._artifact(f"{name}-{self._gsi_method}-{self._gsi_removals or 'all'}{key}")
        if path is None or not path.exists():
            log.info("Measuring GSI on %s; this takes minutes, once.", self.llm.name)
        return gsi(
            self.scorer,
            ladder_bytes,
            costs,
            method=self._gsi_method,
            stop=self._gsi_removals,
            path=path,
            progress=self._progress,
        )

    def _packaged_gsi(self) -> GSIProfile | None:
        """The order in the package that was measured with this model, text and settings."""
        for path in PACKAGED_ORDERS:
            with contextlib.suppress(ArtifactError):
                profile = GSIProfile.load(path, self.llm)
                settings = profile.method, len(profile.order)
                text = profile.provenance["text"]["sha256"]
                if (*settings, text) == (self._gsi_method, self._gsi_removals, self.corpus.sha256):
                    return profile
        return None

    @cached_property
    def _earlier_costs(self) -> list[LevelCosts]:
        """The costs in the package, then those that the model was prepared with, if it has any.

        Their text is a mixture of kinds or the user's; their provenance names it. A calibration
        text that is named has costs of its own.
        """
        if self.corpus.provenance.get("source") != "self":
            return []
        prepared = prepared_costs(self.llm)
        earlier = [] if prepared is None else [prepared]
        with contextlib.suppress(ArtifactError):  # it is another model
            earlier.insert(0, LevelCosts.load(PACKAGED_COSTS, self.llm))
        return earlier

    def _gradient_costs(self, cache_levels: tuple[str, ...]) -> LevelCosts:
        from rap_env.importance.gradient_costs import gradient_costs, item_levels

        def measure() -> LevelCosts:
            log.info("Computing costs of levels of %s (once)", self.llm.name)
            levels = item_levels(self.llm.facts, cache_levels, self.corpus.tokens.shape[1])
            return gradient_costs(self.llm, self.corpus, levels, progress=self._progress)

        return self._cached(f"gradient-{digest(cache_levels)[:8]}", LevelCosts, measure)

    def _cached(self, name: str, kind: type[ProfileT], measure: Callable[[], ProfileT]) -> ProfileT:
        """A profile that is in the folder, or is measured and saved there."""
        path = self._artifact(name)
        if path is not None and path.exists():
            return kind.load(path, self.llm)
        profile = measure()
        if path is not None:
            profile.save(path)
        return profile

    def _artifact(self, name: str) -> Path | None:
        """The file for one model, text and way of measuring."""
        key = digest(dict(self.scorer.context))[:24]
        return None if self._folder is None else self._folder / f"{name}-{key}.json"
