"""What is gained by a mask of the text's own kind: tables from the rows of the text study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from experiments.comparison.formatting import Table, markdown, percent, plain, signed, wrapped
from experiments.comparison.statistics import Estimate, bootstrap_mean, paired_difference
from experiments.config.common import Cell
from experiments.studies.rows import StudyRow

SHARED = "shared"
"""A mask searched on a part of every kind, together as long as the text of one kind."""
SHARED_ALL = "shared_all"
"""A mask searched on all text of all kinds."""
OTHERS = "others"
"""The masks of the other kinds; their losses are averaged."""

Losses = npt.NDArray[np.float64]

CAPTION = (
    "Loss on held-out text of each kind (nats per token over the dense model, with a 95 % "
    "interval over windows) of masks searched on each kind alone, on a part of every kind with "
    f"as many tokens ({SHARED}), and on all their text ({SHARED_ALL}), mean over requests."
)
GAIN_CAPTION = (
    "Loss of the mask of the text's own kind minus that of another mask, paired over windows: "
    "below 0, knowing the kind of text helps."
)


class TextComparison:
    """The rows of one text study.

    Args:
        rows: A row for each text searched on, cell and report text.
    """

    def __init__(self, rows: Sequence[StudyRow]) -> None:
        self._rows = {(row.searched_on, row.cell, row.text): row for row in rows}
        self.kinds = list(dict.fromkeys(row.text for row in rows))
        self.searched_on = list(dict.fromkeys(row.searched_on for row in rows))
        self.cells = list(dict.fromkeys(row.cell for row in rows))

    def losses(self, searched_on: str, kind: str, cells: Sequence[Cell] | None = None) -> Losses:
        """Losses of a text's mask on the windows of a kind, mean over cells, (windows,).

        Args:
            searched_on: A kind, `SHARED`, `SHARED_ALL` or `OTHERS`.
            kind: A kind.
            cells: The cells; None for all.
        """
        names = [searched_on]
        if searched_on == OTHERS:
            names = [name for name in self.kinds if name != kind]
        found = [
            self._rows[name, cell, kind].window_losses
            for name in names
            for cell in (self.cells if cells is None else cells)
        ]
        mean: Losses = np.asarray(found, dtype=np.float64).mean(axis=0)
        return mean

    def gain(
        self, against: str, kinds: Sequence[str], cells: Sequence[Cell] | None = None
    ) -> Estimate:
        """Loss of the own kind's mask minus that of another, mean over some kinds.

        The kinds have the same number of windows, drawn apart from one another, so that
        averaging windows of the same place and resampling those is resampling each kind's.
        """
        own = np.mean([self.losses(kind, kind, cells) for kind in kinds], axis=0)
        other = np.mean([self.losses(against, kind, cells) for kind in kinds], axis=0)
        return paired_difference(own, other)

    @property
    def rivals(self) -> list[str]:
        """What the own mask is compared with."""
        return [*[name for name in self.searched_on if name not in self.kinds], OTHERS]

    def matrix_table(self, cells: Sequence[Cell] | None = None) -> Table:
        """Texts searched on as lines, kinds that are reported on as columns."""
        header = ["Mask searched on", *self.kinds, "mean"]
        rows = []
        for name in self.searched_on:
            losses = [self.losses(name, kind, cells) for kind in self.kinds]
            shown = [str(bootstrap_mean(values)) for values in losses]
            rows.append([name, *shown, f"{np.mean(losses):.3f}"])
        return header, rows

    def gain_table(self) -> Table:
        """For each kind, and for all: own mask minus shared masks and those of other kinds."""
        header = ["Held-out text", *[f"own - {name}" for name in self.rivals]]
        groups = {kind: [kind] for kind in self.kinds} | {"all kinds": self.kinds}
        rows = [
            [label, *[signed(self.gain(rival, kinds)) for rival in self.rivals]]
            for label, kinds in groups.items()
        ]
        return header, rows

    def verdict(self) -> str:
        """The answer in a sentence for each shared mask."""
        parts = []
        for rival in self.rivals:
            found = self.gain(rival, self.kinds)
            share = found.mean / max(1e-12, self._mean(rival))
            if found.high < 0:
                answer = "something to gain"
            elif found.low > 0:
                answer = "nothing to gain but to lose"
            else:
                answer = "no clear gain"
            parts.append(
                f"against {rival}: {answer} ({signed(found)} nats per token, {100 * share:+.1f} %)"
            )
        return f"From knowing the kind of text there is, {'; '.join(parts)}."

    def text(self) -> str:
        """Tables and answer for the terminal."""
        parts = [plain(self.matrix_table()), wrapped(CAPTION), plain(self.gain_table()),
                 wrapped(GAIN_CAPTION), wrapped(self.verdict())]  # fmt: skip
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """Tables, those of single requests too, and answer."""
        parts = ["# Kinds of text\n", CAPTION + "\n", markdown(self.matrix_table())]
        parts += [GAIN_CAPTION + "\n", markdown(self.gain_table()), self.verdict() + "\n"]
        for cell in self.cells:
            title = f"## {cell[0]} x {cell[1]} tokens at {percent(cell[2], 0)}\n"
            parts += [title, markdown(self.matrix_table([cell]))]
        return "\n".join(parts)

    def _mean(self, rival: str) -> float:
        return float(np.mean([self.losses(rival, kind) for kind in self.kinds]))
