"""The context of a score table: everything that environments and agents need, without a model.

A step of such an environment takes microseconds; neither torch nor transformers is loaded.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from rap_env.artifacts import with_tuples
from rap_env.context.base import ContextConfig, PruningContext
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import GSIProfile, OneShotProfile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import Plan, block_name
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.score_table import ScoreTable, TableScorer

log = logging.getLogger(__name__)


class TableContext(PruningContext):
    """Memory arithmetic, scores and importance from a score table.

    What needs text or a model (`llm`, `corpus`, `layer_influence`) raises
    `ModelNotAvailableError`. `importance` and `frontier` are as in `ContextConfig`; without
    `frontier`, the best known plans are all that the table has measured.

    Args:
        name: What error messages call the table.
        memory: The byte arithmetic of the model that is served; None is that of the table's
            model.

    Raises:
        ArtifactError: ``importance="gsi"``, but the table has no GSI order.
    """

    def __init__(
        self,
        table: ScoreTable,
        name: str,
        *,
        importance: str = "gsi",
        frontier: str | None = None,
        memory: MemoryModel | None = None,
    ) -> None:
        self.table = table
        self.name = name
        self.memory = MemoryModel(table.facts) if memory is None else memory
        costs = None if table.levels is None else LevelCosts(**table.levels)
        self._level_costs = costs
        self.scorer = TableScorer(table, None if costs is None else costs.delta_nll)
        self.frontier_path = frontier
        self.importance = importance
        if importance == "gsi":
            _ = self.gsi  # raises an error if there is none

    @property
    def llm(self) -> NoReturn:
        """Raises `ModelNotAvailableError`: a score table has no model."""
        raise ModelNotAvailableError(
            f"The score table {self.name} holds scores and no model, which running text, tasks "
            f"or generation needs; give the model itself ({self.table.facts.name})."
        )

    corpus = layer_influence = llm

    @cached_property
    def one_shot(self) -> OneShotProfile:
        """One-shot importance of every block."""
        return OneShotProfile(**with_tuples(self.table.one_shot))

    def _block_gsi(self) -> GSIProfile:
        if self.table.gsi is None:
            raise ArtifactError(
                f"The score table {self.name} was made with importance="
                f"{self.table.settings['importance']!r} and has no GSI order; pass "
                "importance='one_shot' or 'none', or make a table with importance=gsi."
            )
        return GSIProfile(**with_tuples(self.table.gsi))

    @cached_property
    def frontier(self) -> PlanTable:
        """The best known plans: those of the artifact, or without one those of this table.

        Raises:
            ArtifactError: There is no artifact at the given path, or it is damaged.
        """
        if self.frontier_path is not None:
            return super().frontier
        return PlanTable(
            num_layers=self.table.facts.num_layers,
            dense_nll=self.table.native_nll,
            scores=self.table.scores,
            evaluations_run=0,
            seconds=0.0,
            settings={},
            provenance={"text": self.table.text, "scoring": self.table.context},
        )

    def best_measured(self, request: Request) -> Plan | None:
        """The measured plan of least NLL that fits a request; None if none does.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
        """
        peak_bytes, budget = self.memory.peak_bytes, request.budget_bytes
        fitting = (p for p in self._by_nll if peak_bytes(p, request) <= budget)
        return next(fitting, None)

    @cached_property
    def _by_nll(self) -> list[Plan]:
        scores = self.table.scores
        return sorted(scores, key=scores.__getitem__)

    def level_costs(self, ladder: Ladder) -> LevelCosts:
        """One-shot costs of the levels of all items.

        Raises:
            ArtifactError: The table has none, or not of these levels of caches.
        """
        costs = self._level_costs
        if costs is None:
            raise ArtifactError(
                f"The score table {self.name} has no costs of levels; choose another policy, pass "
                "importance='none' to an environment, or make a table with them "
                "(ScoreTable.fitted(..., levels=...))."
            )
        known = [level.name for level in costs.cache_levels]
        for level in ladder.cache_levels:
            if level not in known:
                raise ArtifactError(
                    f"The score table {self.name} has no costs of caches at level {level}, only "
                    f"of {', '.join(known)}; name these levels, or make another table."
                )
        return costs

    def item_gsi(self, ladder_bytes: LadderBytes) -> GSIProfile:
        """The GSI order over blocks that the measured masks hold: the best next one first.

        Raises:
            ArtifactError: The items have further levels, of which a table has no order.
        """
        ladder = ladder_bytes.ladder
        if not ladder.removes_only:
            raise ArtifactError(
                f"The score table {self.name} has no GSI over items; pass importance='one_shot' or "
                "'none' to an environment, or choose another policy, such as greedy_per_byte."
            )
        scores, mask = self.table.scores, Plan()
        order, nll_after = [], []
        while nexts := {
            block: scores[plan]
            for block in set(range(self.table.facts.num_blocks)) - mask.removed
            if (plan := mask.without(block)) in scores
        }:
            block = min(nexts, key=nexts.__getitem__)
            mask = mask.without(block)
            order.append(block_name(block))
            nll_after.append(nexts[block])
        rises = map(float, self.one_shot.delta_nll)
        return GSIProfile(
            evaluations=0,
            evaluations_run=0,
            block_forwards=0.0,
            seconds=0.0,
            provenance={},
            method="lazy",
            together=(),
            first_nll={},
            candidates=(),
            levels={item.name: list(item.levels) for item in ladder.items},
            dense_nll=self.table.native_nll,
            order=tuple(order),
            nll_after=tuple(nll_after),
            last_rises={block_name(block): rise for block, rise in enumerate(rises)},
        )


def open_table(path: Path, config: ContextConfig) -> TableContext:
    """Open the context of a score table.

    A table was measured with certain settings. A setting at its default takes the table's
    value; any other value must equal the table's. `ContextConfig.store` is ignored: nothing
    is measured.

    Raises:
        ModelNotAvailableError: There is no such file.
        ArtifactError: It is damaged, of another format, or was measured with other settings.
    """
    table = ScoreTable.load(path)
    _check_settings(path, table, config)
    text = table.settings["calibration"]
    log.info(
        "%s: %d scores of %s (%s) on %d x %d tokens.", path, len(table.scores), table.facts.name,
        table.facts.dtype, text["windows"], text["window_tokens"],
    )  # fmt: skip
    return TableContext(table, str(path), importance=config.importance, frontier=config.frontier)


def _check_settings(path: Path, table: ScoreTable, config: ContextConfig) -> None:
    """Reject settings that differ from those that the table was measured with."""
    measured_with = table.settings
    text = {**measured_with["calibration"], "sha256": table.text["sha256"]}
    default, asked_text = ContextConfig(), config.calibration
    asked: list[tuple[str, Any, Any, Any]] = [
        (f"calibration.{entry.name}", getattr(asked_text, entry.name), entry.default,
         text[entry.name])
        for entry in fields(CorpusConfig)
    ]  # fmt: skip
    asked += [
        (name, getattr(config, name), getattr(default, name), measured_with[name])
        for name in ("device", "dtype", "gsi_removals", "gsi_method")
    ]
    for name, value, unset, measured in asked:
        if value not in (unset, measured):
            raise ArtifactError(
                f"The score table {path} was measured with {name}={measured!r}, so it cannot give "
                f"{name}={value!r}; leave that setting at its default, or make another table."
            )
