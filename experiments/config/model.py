"""Settings of the language model, its importance scores, its repair, and exported tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from experiments.config.common import (
    CellText,
    Count,
    CountOrZero,
    Fraction,
    Section,
    TextConfig,
    among,
    parse_cell,
)
from experiments.study.records import Cell
from rap_env.errors import check_name

REPAIRS = ("none", "library", "distilled")


@dataclass
class ModelConfig:
    """The language model that is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training only)."""
    device: str = "auto"
    """``auto`` (CUDA if there is a device), ``cpu``, or ``cuda``."""
    dtype: str = "auto"
    """``auto`` (the faster one here), ``bfloat16``, ``float16`` or ``float32``."""
    weights: str = "auto"
    """``bf16``: unquantised, in `dtype`; ``native``: as the model's file has them; ``int8`` or
    ``int4``; ``auto``: native if ``env.id`` is ``RAPLadder-v0``, else bf16."""
    max_memory_bytes: int | None = None
    """Memory cap; layers are then streamed from files one at a time. null loads the model."""


@dataclass
class StubsConfig(Section):
    """Settings of ``experiments.repair``: texts to fit on, distillation and comparison."""

    section = "stubs"
    fit_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to fit on, by name; the library is fitted on all of them together."""
    report_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to report on, by name; never fitted on."""
    held_back_share: Fraction = 0.25
    """Windows held back to choose ranks and penalties, as a share of those fitted on."""
    rank: CountOrZero = 64
    """Mean rank of the stubs."""
    distill_steps: CountOrZero = 1200
    """Updates of the distillation; 0 for no distillation."""
    distill_windows: Count = 8
    """Windows of each update."""
    learning_rate: float = 1e-3
    repairs: list[Annotated[str, among(*REPAIRS)]] = field(default_factory=lambda: list(REPAIRS))
    """Repairs to compare; empty to make only the libraries."""
    cells: list[CellText] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ fraction of the dense peak."""
    study_cells: list[str] = field(default_factory=list)
    """Cells that `domain_study` uses; empty for all."""
    domain_study: list[str] = field(default_factory=list)
    """Names of `fit_texts` to fit on alone, equally much of each; empty for no such study."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.domain_study:
            check_name("text of stubs.domain_study", name, self.fit_texts)
        for name in self.study_cells:
            check_name("cell of stubs.study_cells", name, self.cells)

    @property
    def parsed_cells(self) -> list[Cell]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]

    def cells_of(self, study: str) -> list[Cell]:
        """Return the cells of the ``"grid"``, or of the ``"domain"`` study."""
        few = study != "grid" and self.study_cells
        return [parse_cell(text) for text in self.study_cells] if few else self.parsed_cells
