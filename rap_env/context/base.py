"""The interface of pruning contexts, their configuration, and shared code of the two kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.orders import LadderOrder, LoweringStep, check_ladder, greedy_order
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import GSI_METHODS, GSIProfile, OneShotProfile
from rap_env.ladder.features import EveryLevel, ImportanceFeatures, ItemImportance
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.levels import LevelSpec
from rap_env.memory import MemoryModel
from rap_env.plan import block_name
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.store import ScoreStore
from rap_env.specs import check, setting

if TYPE_CHECKING:  # a context without a live model loads no torch
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.scoring.score_table import TableScorer
    from rap_env.scoring.scorer import PlanScorer

    Scorer = PlanScorer | TableScorer

IMPORTANCES = ("gsi", "gradient", "one_shot", "none")
"""Kinds of importance that agents may observe; any other value is the path of a GSI
artifact."""


@dataclass(frozen=True)
class ContextConfig:
    """Configuration of a pruning context: plain values, usable as a key and in records.

    Attributes:
        model: Alias, hub id, folder or GGUF file; or ``"score_table:PATH"``, which has scores
            and no model (see `rap_env.context.table`); ``"score_table:smollm2-135m"`` is a
            table in the package.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` ...
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` ...
        weights: ``"bf16"`` (unquantised, in `dtype`), or another value of `rap_env.load_llm`.
        calibration: The text that plans are searched on.
        importance: ``"gsi"`` (measured once, then cached), ``"gradient"`` (costs of levels by
            gradient, `rap_env.importance.gradient_costs`), ``"one_shot"`` (2L evaluations; of
            items with further levels the same as ``"gradient"``), ``"none"``, or the path of
            a GSI artifact.
        gsi_removals: Number of removals, or of actions on items, after which GSI stops; None
            orders all blocks or items.
        gsi_method: ``"exact"`` or ``"lazy"``, see `rap_env.gsi`.
        frontier: Path of a frontier artifact (`rap_env.importance.plan_table`); None if
            nothing needs the best known plans.
        store: ``"default"`` (in the cache), a path, or None to keep scores in memory.

    Raises:
        InvalidRequestError: A value has the wrong type or is out of range.
        UnknownNameError: There is no such GSI method.
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "bf16"
    calibration: CorpusConfig = field(default_factory=CorpusConfig)
    importance: str = "gsi"
    gsi_removals: int | None = setting(16, low=1)
    gsi_method: str = setting("exact", choices=GSI_METHODS, kind="GSI method")
    frontier: str | None = None
    store: str | None = "default"

    def __post_init__(self) -> None:
        check(self)


class PruningContext(ABC):
    """A model with its memory arithmetic, calibration text, scorer and importance.

    Environments, agents, baselines and experiments take a context, so that all of them
    measure the same plans on the same text and share one model and one score store.
    `LiveContext` has a live model. `TableContext` has a score table instead; there, `llm`,
    `corpus` and `layer_influence` raise `ModelNotAvailableError`.

    Attributes:
        memory: The model's byte arithmetic.
        scorer: Scores plans on the calibration text.
        store: The store of scores; None if they are kept in memory or come from a table.
        importance: The kind of importance that an agent observes, see `ContextConfig`.
        frontier_path: Path of the frontier artifact, if one was given.
    """

    memory: MemoryModel
    scorer: Scorer
    store: ScoreStore | None = None
    importance: str
    frontier_path: str | None

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        return self  # environments share it

    @property
    @abstractmethod
    def llm(self) -> ElasticLLM:
        """The live model."""

    @property
    @abstractmethod
    def corpus(self) -> Corpus:
        """The calibration text."""

    @property
    @abstractmethod
    def layer_influence(self) -> npt.NDArray[np.float64]:
        """Block influence of each whole layer, shape (L,)."""

    @property
    @abstractmethod
    def one_shot(self) -> OneShotProfile:
        """One-shot importance of every block."""

    @abstractmethod
    def level_costs(self, ladder: Ladder, /) -> LevelCosts:
        """Costs of the levels of a ladder, and of others."""

    @abstractmethod
    def item_gsi(self, ladder_bytes: LadderBytes, /) -> GSIProfile:
        """GSI over the items of a ladder; an `ArtifactError` if there is none."""

    @abstractmethod
    def _block_gsi(self) -> GSIProfile:
        """The GSI order of blocks, if `importance` is not the path of one."""

    @cached_property
    def gsi(self) -> GSIProfile:
        """The GSI order of blocks: measured, or the artifact that `importance` names.

        Raises:
            ArtifactError: There is none, or it is damaged or of other items.
        """
        if self.importance in IMPORTANCES:
            return self._block_gsi()
        profile = GSIProfile.load(self.importance, self.memory)
        check_ladder(profile, Ladder.of(self.memory.facts, "masks"))
        return profile

    @cached_property
    def frontier(self) -> PlanTable:
        """The best known plans; an `ArtifactError` without artifact."""
        path = self.frontier_path
        if path is None or not Path(path).exists():
            raise ArtifactError(
                f"There is no frontier artifact ({path or 'no path was given'}); build one with "
                "rap_env.importance.plan_search.build_plan_table(...).save(path), or in a checkout "
                "with `python -m experiments.profile frontier.evaluations=3000`."
            )
        return PlanTable.load(path, self.memory)

    @cached_property
    def features(self) -> ImportanceFeatures:
        """The importance of the blocks, as an agent observes it."""
        if self.importance == "none":
            return ImportanceFeatures.none(self.memory.facts.num_blocks)
        if self.importance == "one_shot":
            return ImportanceFeatures.from_one_shot(self.one_shot.delta_nll)
        if self.importance == "gradient":
            costs = self.level_costs(Ladder.of(self.memory.facts, "masks"))
            blocks = range(self.memory.facts.num_blocks)
            rises = np.array([costs.cost(block_name(index), "removed") for index in blocks])
            return ImportanceFeatures.from_one_shot(rises)
        gsi = self.gsi
        return ImportanceFeatures(gsi.first_pass, gsi.rank, gsi.marginal_delta_nll)


def item_order(
    context: PruningContext, ladder_bytes: LadderBytes, importance: str | None = None
) -> LadderOrder:
    """An order over the items of a ladder: greedy from costs of levels, or measured by GSI.

    `importance` is the context's unless it is given.
    """
    costs = context.level_costs(ladder_bytes.ladder)
    if (importance or context.importance) in ("gradient", "one_shot"):
        return greedy_order(costs, ladder_bytes)
    return greedy_order(costs, ladder_bytes, context.item_gsi(ladder_bytes))


def costs_of(context: PruningContext, ladder: Ladder) -> LevelCosts:
    """The costs of a ladder's levels; if it only removes, the one-shot importance of the blocks."""
    if ladder.removes_only:
        return LevelCosts.of_removals(context.one_shot)
    return context.level_costs(ladder)


def method_order(
    context: PruningContext, ladder_bytes: LadderBytes, importance: str
) -> tuple[Sequence[LoweringStep], int]:
    """The steps of an order that a method follows, and the evaluations that it needed.

    If the ladder only removes, it is the order of the rise in NLL alone, one-shot or by GSI
    (`full_order`). Where items have further levels, it is `item_order`, by the rise per byte.
    """
    by_gsi, ladder = importance == "gsi", ladder_bytes.ladder
    if not ladder.removes_only:
        steps = item_order(context, ladder_bytes, importance).steps
        evaluations = context.level_costs(ladder).evaluations
        return steps, evaluations + (context.item_gsi(ladder_bytes).evaluations if by_gsi else 0)
    if by_gsi:
        return [(block, 1) for block in context.gsi.full_order], context.gsi.evaluations
    order: list[int] = np.argsort(context.one_shot.delta_nll, kind="stable").tolist()
    return [(block, 1) for block in order], context.one_shot.evaluations


def make_encoder(
    context: PruningContext,
    layout: str,
    levels: LevelSpec,
    together: Sequence[str],
    every_level: bool = False,
) -> ObservationEncoder:
    """Make what encodes the observations of a context's model.

    Args:
        context: The model with the importance that an agent observes: measured, or zeros.
        layout: The entry of an observation with a row for each item: ``"ladder"``, as in
            `RAPLadder-v0`, or ``"blocks"``, as in `RAPPrune-v0`, which removes blocks only.
        levels: As for `Ladder.of`.
        together: As for `Ladder.of`.
        every_level: Whether rows of items also have the columns of `EveryLevel`.

    Raises:
        UnknownNameError: There is no such ladder or level.
        InvalidRequestError: No item has more than one of the levels.
        ArtifactError: The context lacks the importance.
    """
    if layout == ImportanceFeatures.key:
        return ObservationEncoder(mask_bytes(context.memory), context.features)
    ladder = Ladder.of(context.memory.facts, levels, together)
    ladder_bytes = LadderBytes(context.memory, ladder)
    if context.importance == "none":
        importance = ItemImportance.none(ladder)
    else:
        importance = item_order(context, ladder_bytes).importance
    if every_level:
        sizes = ladder_bytes.tables.item_bytes.reshape(len(ladder), ladder.width)
        importance = EveryLevel(importance.one_shot, importance.place, importance.reached, sizes)
    return ObservationEncoder(ladder_bytes, importance)
