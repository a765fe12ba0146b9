"""Settings of the language model, its importance scores, its repair, and exported tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from experiments.config.common import (
    CellText,
    CountOrZero,
    Section,
    TextConfig,
    among,
    parse_cell,
)
from experiments.study.records import Cell
from rap_env.repair.config import REPAIRS


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
    """Settings of ``experiments.repair``: texts to fit on and comparison."""

    section = "stubs"
    fit_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to fit on, by name; the library is fitted on all of them together."""
    report_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Texts to report on, by name; never fitted on."""
    rank: CountOrZero = 64
    """Mean rank of the stubs."""
    repairs: list[Annotated[str, among(*REPAIRS)]] = field(default_factory=lambda: list(REPAIRS))
    """Repairs to compare; empty to make only the libraries."""
    cells: list[CellText] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ fraction of the dense peak."""

    @property
    def parsed_cells(self) -> list[Cell]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]
