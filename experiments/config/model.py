"""Which language model, what is measured of it, and what stands in for removed blocks."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from experiments.config.parts import at_least
from rap_env.errors import UnknownNameError


@dataclass
class ModelConfig:
    """Which language model is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training alone)."""
    device: str = "auto"
    dtype: str = "auto"
    max_memory_bytes: int | None = None
    """Memory cap under which layers are read from files one at a time; null loads the model."""


@dataclass
class ImportanceConfig:
    """Which importance the agent observes, and how far GSI goes."""

    method: str = "gsi"
    """``gsi``, ``one_shot`` or ``none``."""
    gsi_removals: int | None = None
    """Blocks that GSI removes before it stops; null for all."""
    gsi_method: str = "exact"
    """``exact``, or ``lazy`` or ``halving``, which are several times quicker."""

    def __post_init__(self) -> None:
        """Refuse unknown methods."""
        if self.method not in ("gsi", "one_shot", "none"):
            raise UnknownNameError("importance", self.method, ["gsi", "one_shot", "none"])
        if self.gsi_method not in ("exact", "lazy", "halving"):
            raise UnknownNameError("GSI method", self.gsi_method, ["exact", "lazy", "halving"])
        at_least("importance", 1, gsi_removals=self.gsi_removals)


@dataclass
class RepairConfig:
    """What stands in the place of removed blocks."""

    name: str = "none"
    """``none``; ``library``: stubs fitted on self-written text, once; or the path of a library."""


@dataclass
class ExportConfig:
    """What ``experiments.export_scores`` makes a score table of."""

    masks: int | None = None
    """Masks to measure first, those that the store already has counted; null for none."""
    path: str | None = None
    """The table's file; null for one in the run folder."""

    def __post_init__(self) -> None:
        """Refuse a table of nothing."""
        at_least("export", 1, masks=self.masks)
