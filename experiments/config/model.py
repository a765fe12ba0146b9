"""Which language model, what is measured of it, and what stands in for removed blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from experiments.config.common import TextConfig, at_least, parse_cell
from experiments.errors import ExperimentError
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


POLICY_SUFFIX = ".safetensors"
REPAIRS = ("none", "library", "distilled", "per_mask")


@dataclass
class StubsConfig:
    """What ``experiments.repair`` fits, distils and compares."""

    fit_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to fit on, by name; all of them together make the library."""
    report_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to report on, by name; none of it is fitted on."""
    held_back_share: float = 0.25
    """Windows held back to choose ranks and penalties, as a share of those fitted on."""
    rank: int = 64
    """Mean rank of the stubs."""
    distill_steps: int = 1200
    """Updates of the distillation; 0 for none."""
    distill_windows: int = 8
    """Windows of each update."""
    learning_rate: float = 1e-3
    repairs: list[str] = field(default_factory=lambda: ["none", "library", "distilled", "per_mask"])
    """What is compared; empty to make the libraries alone."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ share of the dense peak."""
    study_cells: list[str] = field(default_factory=list)
    """Those of the cells that the studies below use; empty for all."""
    token_study: list[int] = field(default_factory=list)
    """Numbers of tokens to fit on, to show what they are worth; empty for no such study."""
    domain_study: list[str] = field(default_factory=list)
    """Texts of `fit_texts` to fit on alone, as much of each; empty for no such study."""
    alone: list[str] = field(default_factory=list)
    """Texts of `fit_texts` to fit on alone, all of it, and to search masks with."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers, cells and names."""
        at_least("stubs", 0, rank=self.rank, distill_steps=self.distill_steps)
        at_least("stubs", 1, distill_windows=self.distill_windows)
        if not 0 < self.held_back_share <= 1:
            raise ExperimentError(
                f"stubs.held_back_share must be above 0 and at most 1, not {self.held_back_share}."
            )
        for name in self.repairs:
            if name not in REPAIRS:
                raise UnknownNameError("repair", name, REPAIRS)
        for study, names in (("domain_study", self.domain_study), ("alone", self.alone)):
            for name in names:
                if name not in self.fit_texts:
                    raise UnknownNameError(f"text of stubs.{study}", name, self.fit_texts)
        for name in self.study_cells:
            if name not in self.cells:
                raise UnknownNameError("cell of stubs.study_cells", name, self.cells)
        _ = self.parsed_cells

    def cells_of(self, study: str) -> list[tuple[int, int, float]]:
        """The cells that a study of `experiments.repair.rows.STUDIES` uses."""
        few = study != "grid" and self.study_cells
        return [parse_cell(text) for text in self.study_cells] if few else self.parsed_cells

    @property
    def parsed_cells(self) -> list[tuple[int, int, float]]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]


@dataclass
class ExportPolicyConfig:
    """What is exported, and where to."""

    run: str = MISSING
    """Folder of a training, such as runs/learning/train/rap-s0."""
    out: str = MISSING
    """The file to write; its name ends in .safetensors."""

    def __post_init__(self) -> None:
        """Refuse a name that `load_policy` would not know again."""
        if not self.out.endswith((POLICY_SUFFIX, MISSING)):
            raise ExperimentError(
                f"out must end in {POLICY_SUFFIX}, such as rap{POLICY_SUFFIX}, not {self.out}."
            )
