"""A context without a model: everything that environments and agents ask of one, out of a file.

Stepping such an environment costs microseconds and loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rap_env.context.live import IMPORTANCES, ContextConfig, PruningContext
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.memory import MemoryModel
from rap_env.repair import repair_label
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.score_table import ScoreTable, TableScorer, with_tuples

if TYPE_CHECKING:
    from rap_env.importance import GSIProfile, ImportanceFeatures, OneShotProfile
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)


class TableContext(PruningContext):
    """Memory arithmetic, scores and importance of a model that is not there.

    Args:
        table: Where they come from.
        name: What to call the table in messages.
        importance: As in `ContextConfig`.
        frontier: As in `ContextConfig`.

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
    ) -> None:
        # Not the base's: it would ask for a model.
        self.table = table
        self.name = name
        self.store = None
        self.memory = MemoryModel(table.facts)
        # It has what environments and agents use; what needs text or a model needs `llm` too.
        self.scorer = cast("MaskScorer", TableScorer(table))
        self._importance = importance
        self.frontier_path = frontier
        if importance == "gsi" and table.gsi is None:
            raise ArtifactError(self._no_gsi())

    @property
    def llm(self) -> ElasticLLM:
        """There is none.

        Raises:
            ModelNotAvailableError: Always.
        """
        raise ModelNotAvailableError(
            f"The score table {self.name} holds scores and no model, which running text, tasks "
            f"or generation needs; give the model itself ({self.table.facts.name})."
        )

    @cached_property
    def one_shot(self) -> OneShotProfile:
        """One-shot importance of every block."""
        from rap_env.importance import OneShotProfile

        return OneShotProfile(**with_tuples(self.table.one_shot))

    @cached_property
    def gsi(self) -> GSIProfile:
        """The GSI order.

        Raises:
            ArtifactError: The table has none.
        """
        from rap_env.importance import GSIProfile

        if self._importance not in IMPORTANCES:
            return GSIProfile.load(self._importance, self.memory)
        if self.table.gsi is None:
            raise ArtifactError(self._no_gsi())
        return GSIProfile(**with_tuples(self.table.gsi))

    @cached_property
    def features(self) -> ImportanceFeatures:
        """What an agent sees of the importance scores, the same as with the live model."""
        from rap_env.features import ImportanceFeatures

        if self._importance == self.table.settings["importance"]:
            arrays = {name: np.array(values) for name, values in self.table.features.items()}
            return ImportanceFeatures(**arrays)
        if self._importance == "one_shot":
            return ImportanceFeatures.from_one_shot(self.table.loss_alone)
        return super().features

    def _no_gsi(self) -> str:
        held = self.table.settings["importance"]
        return (
            f"The score table {self.name} was made with importance={held!r} and has no GSI "
            "order; pass importance='one_shot' or 'none', or make a table with importance=gsi."
        )


def open_table(path: Path, config: ContextConfig) -> TableContext:
    """The context of a score table.

    The table was measured in one way. A setting that is left at its default takes what the
    table holds, and any other value has to be what it holds. `ContextConfig.store` is of no
    use here: nothing is measured.

    Args:
        path: The table's file.
        config: Settings; its ``model`` names the table.

    Raises:
        ModelNotAvailableError: There is no such file.
        ArtifactError: It is damaged, of another format, or was measured in another way.
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
    """Refuse what a table cannot give."""
    held, text = table.settings, table.settings["calibration"]
    default, asked_text = ContextConfig(), config.calibration
    asked: list[tuple[str, Any, Any, Any]] = [
        (f"calibration.{entry.name}", getattr(asked_text, entry.name), entry.default,
         text[entry.name])
        for entry in fields(CorpusConfig)
    ]  # fmt: skip
    asked += [
        (name, getattr(config, name), getattr(default, name), held[name])
        for name in ("device", "dtype", "gsi_removals", "gsi_method")
    ]
    measured_repair = held.get("repair", default.repair)  # older tables know of none
    asked.append(("repair", repair_label(config.repair), default.repair, measured_repair))
    for name, value, unset, measured in asked:
        if value not in (unset, measured):
            raise ArtifactError(
                f"The score table {path} was measured with {name}={measured!r}, so it cannot give "
                f"{name}={value!r}; leave that setting at its default, or make another table."
            )
