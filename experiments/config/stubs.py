"""What ``experiments.repair`` fits, distils and compares."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.parts import TextConfig, at_least, parse_cell
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

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
