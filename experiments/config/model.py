"""Settings of the language model, its importance scores, its repair, and exported files."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from experiments.config.common import Cell, HasCells, TextConfig, at_least, one_of, parse_cell
from experiments.errors import ExperimentError

POLICY_SUFFIX = ".safetensors"
REPAIRS = ("none", "library", "distilled", "per_mask")


@dataclass
class ModelConfig:
    """The language model that is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training only)."""
    device: str = "auto"
    dtype: str = "auto"
    max_memory_bytes: int | None = None
    """Memory cap; layers are then streamed from files one at a time. null loads the model."""


@dataclass
class ImportanceConfig:
    """Importance scores that the agent observes."""

    method: str = "gsi"
    """``gsi``, ``one_shot`` or ``none``."""
    gsi_removals: int | None = None
    """Number of blocks that GSI removes; null for all."""
    gsi_method: str = "exact"
    """``exact``, or ``lazy`` or ``halving``, which are several times faster."""

    def __post_init__(self) -> None:
        one_of("importance", self.method, ("gsi", "one_shot", "none"))
        one_of("GSI method", self.gsi_method, ("exact", "lazy", "halving"))
        at_least("importance", 1, gsi_removals=self.gsi_removals)


@dataclass
class RepairConfig:
    """What replaces removed blocks."""

    name: str = "none"
    """``none``; ``library``: stubs fitted once on self-written text; or the path of a library."""


@dataclass
class StubsConfig(HasCells):
    """What ``experiments.repair`` fits, distils and compares."""

    fit_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to fit on, by name; the library is fitted on all of them together."""
    report_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to report on, by name; never fitted on."""
    held_back_share: float = 0.25
    """Windows held back to choose ranks and penalties, as a share of those fitted on."""
    rank: int = 64
    """Mean rank of the stubs."""
    distill_steps: int = 1200
    """Updates of the distillation; 0 for no distillation."""
    distill_windows: int = 8
    """Windows of each update."""
    learning_rate: float = 1e-3
    repairs: list[str] = field(default_factory=lambda: ["none", "library", "distilled", "per_mask"])
    """Repairs to compare; empty to make only the libraries."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ fraction of the dense peak."""
    study_cells: list[str] = field(default_factory=list)
    """Cells that the studies below use; empty for all."""
    token_study: list[int] = field(default_factory=list)
    """Numbers of tokens to fit on, to measure how many are needed; empty for no such study."""
    domain_study: list[str] = field(default_factory=list)
    """Names of `fit_texts` to fit on alone, equally much of each; empty for no such study."""
    alone: list[str] = field(default_factory=list)
    """Names of `fit_texts` to fit on alone, the whole text, and to search masks with."""

    def __post_init__(self) -> None:
        at_least("stubs", 0, rank=self.rank, distill_steps=self.distill_steps)
        at_least("stubs", 1, distill_windows=self.distill_windows)
        if not 0 < self.held_back_share <= 1:
            raise ExperimentError(
                f"stubs.held_back_share must be above 0 and at most 1, not {self.held_back_share}."
            )
        for name in self.repairs:
            one_of("repair", name, REPAIRS)
        for study in ("domain_study", "alone"):
            for name in getattr(self, study):
                one_of(f"text of stubs.{study}", name, self.fit_texts)
        for name in self.study_cells:
            one_of("cell of stubs.study_cells", name, self.cells)
        _ = self.parsed_cells

    def cells_of(self, study: str) -> list[Cell]:
        """Return the cells that one of `experiments.repair.records.STUDIES` uses."""
        few = study != "grid" and self.study_cells
        return [parse_cell(text) for text in self.study_cells] if few else self.parsed_cells


@dataclass
class ExportConfig:
    """Which score table ``experiments.export_scores`` writes."""

    masks: int | None = None
    """Masks that the store must have; missing ones are measured first. null measures none."""
    path: str | None = None
    """The table's file; null for one in the run folder."""

    def __post_init__(self) -> None:
        at_least("export", 1, masks=self.masks)


@dataclass
class ExportPolicyConfig:
    """All settings of ``experiments.export_policy``."""

    run: str = MISSING
    """Folder of a training run, such as runs/learning/train/rap-s0."""
    out: str = MISSING
    """File to write; its name ends in .safetensors."""

    def __post_init__(self) -> None:
        if not self.out.endswith((POLICY_SUFFIX, MISSING)):  # `load_policy` goes by the suffix
            raise ExperimentError(
                f"out must end in {POLICY_SUFFIX}, such as rap{POLICY_SUFFIX}, not {self.out}."
            )
