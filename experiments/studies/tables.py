"""Tables and the figure of the study of texts, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from experiments.config.common import parse_pinned
from experiments.studies.rows import ALL, CALIBRATION, CostRow, PlanRow, PromptRow
from experiments.study.figures import panels, style
from experiments.study.records import Record
from experiments.study.statistics import Estimate, bootstrap_mean, relative_ratio
from experiments.study.tables import (
    Table,
    TitledTable,
    relative_words,
    shape_words,
    signed_percent,
)
from rap_env.plan import EMBEDDINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = "the other kinds"
"""Plans from the costs of each other kind."""
THRESHOLD = 0.03
"""Relative gap from which it is worth while that a policy sees the kind of text."""

AGREEMENT = (
    "Kendall's tau of the one-shot costs of items on two draws: mean, minimum and maximum over "
    "pairs of draws with different windows. Within a kind, only the seed differs."
)
MATRIX = (
    "ΔNLL (nats/token) of the knapsack's plans by the kind of text that their costs were measured "
    "on (rows) and the kind of report text (columns): mean over requests and draws, with a 95 % "
    f"interval over windows and draws. {ALL}: from the mean of the costs over all kinds, which saw "
    "as many times more text as there are kinds."
)
PROMPTS = (
    "ΔNLL (nats/token) of plans by the kind of text of each window's first {tokens} tokens, on the "
    "whole window, beside plans from the costs on the text's own kind and from equal shares of all "
    "kinds: mean over requests and draws, with a 95 % interval over windows and draws. Two rows "
    "know the other kinds only. Relative: divided by that of equal shares of the same kinds, minus "
    "1 (geometric mean over kinds and requests)."
)
RECOGNISED = (
    "What the first {tokens} tokens of a report window are taken for: mean share of the text's own "
    "kind, of the other ones, and of none, over windows and draws; then with the own kind unknown, "
    "where none is right."
)
SIZES = (
    "ΔNLL (nats/token) of plans from several amounts of calibration text of the kind {sized}, mean "
    "over draws: on the calibration text and on report text, with a 95 % interval over windows and "
    "draws; then on report text at each request and budget. Plans cannot use windows of caches "
    "that hold whole windows of the calibration text, because it does not measure them."
)

Losses = npt.NDArray[np.float64]
"""ΔNLL by draw and window, nats per token, (seeds, windows)."""


class TextStudy:
    """All rows of a study of texts.

    Attributes:
        kinds: Kinds of text.
        cells: Requests with budgets.
        prompt_tokens: First tokens of windows by which plans are chosen; 0 for no such plans.
        sized: Kind whose calibration text has several sizes; empty for none.
    """

    def __init__(self, rows: Sequence[Record]) -> None:
        self._costs = [row for row in rows if isinstance(row, CostRow)]
        plans = [row for row in rows if isinstance(row, PlanRow)]
        prompts = [row for row in rows if isinstance(row, PromptRow)]
        self._windows = {
            (p.chosen_on, p.seed, p.tokens, p.cell, p.judged_on): p.window_losses for p in plans
        }
        self._prompts = {(p.seed, p.cell, p.judged_on, p.known): p for p in prompts}
        texts = dict.fromkeys(row.judged_on for row in plans)
        self.kinds = [kind for kind in texts if kind != CALIBRATION]
        self.cells = list(dict.fromkeys(row.cell for row in plans))
        self._seeds = list(dict.fromkeys(row.seed for row in plans))
        self._tokens = next(row.tokens for row in plans if row.chosen_on == ALL)
        sized = [(row.chosen_on, row.tokens) for row in plans if row.judged_on == CALIBRATION]
        self.sized = sized[0][0] if sized else ""
        self._sizes = sorted({tokens for _, tokens in sized})
        self.prompt_tokens = prompts[0].prompt_tokens if prompts else 0
        self._ladder = plans[0].depends_on["ladder"]

    def losses(
        self, chosen_on: str, judged_on: str, cells: Sequence[str], tokens: int | None = None
    ) -> Losses:
        """ΔNLL of plans, mean over some cells; `tokens` is the size of the calibration text."""
        size = self._tokens if tokens is None else tokens
        windows = [
            [self._windows[chosen_on, seed, size, cell, judged_on] for cell in cells]
            for seed in self._seeds
        ]
        return np.asarray(np.mean(windows, axis=1))

    @property
    def matrix(self) -> dict[str, list[Losses]]:
        """ΔNLL, mean over cells: for what plans were chosen on, on each kind."""
        chosen_on = [*self.kinds, ALL]
        return {c: [self.losses(c, kind, self.cells) for kind in self.kinds] for c in chosen_on}

    def gap(self, rival: str) -> Estimate | None:
        """ΔNLL of the plans of `ALL` or `OTHERS` divided by that of the own kind's, minus 1.

        The geometric mean over kinds and cells; None where `paired_ratio` has none. Kinds have
        equally many windows, drawn independently, so that they may be resampled jointly.
        """
        firsts = []
        for kind, cell in self._pairs:
            rivals = [ALL] if rival == ALL else [name for name in self.kinds if name != kind]
            firsts.append(np.concatenate([self.losses(r, kind, [cell]) for r in rivals]))
        return relative_ratio(
            firsts, [self.losses(kind, kind, [cell]) for kind, cell in self._pairs]
        )

    @property
    def verdict(self) -> str:
        """What a policy would gain that sees the kind of text, in words."""
        gap, others = self.gap(ALL), self.gap(OTHERS)
        if gap is None:
            return "The gap is unknown: some mean ΔNLL is not significantly above 0."
        limit = f"{100 * THRESHOLD:g} %"
        answer = "may be above or below"  # the interval contains the threshold
        if not gap.low <= THRESHOLD < gap.high:
            answer = "is above" if gap.low > THRESHOLD else "is not above"
        return (
            f"The gap {answer} {limit}: relative to plans from costs on the text's own kind, plans "
            f"from costs on all kinds have a ΔNLL of {relative_words(gap)}, and those from costs "
            f"on one of {OTHERS} of {relative_words(others)} (geometric mean over kinds and "
            "requests, with a 95 % interval over windows and draws)."
        )

    def prompt_losses(
        self, judged_on: str, cells: Sequence[str], *, known: bool, general: bool = False
    ) -> Losses:
        """ΔNLL of plans by prompts, mean over some cells; `general` is that of equal shares."""
        rows = [[self._prompts[seed, c, judged_on, known] for c in cells] for seed in self._seeds]
        windows = [[r.general_losses if general else r.window_losses for r in own] for own in rows]
        return np.asarray(np.mean(windows, axis=1))

    def prompt_gain(self, *, known: bool) -> Estimate | None:
        """ΔNLL of plans by prompts divided by that of equal shares, minus 1; see `gap`."""
        return relative_ratio(
            [self.prompt_losses(k, [c], known=known) for k, c in self._pairs],
            [self.prompt_losses(k, [c], known=known, general=True) for k, c in self._pairs],
        )

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        return [(kind, cell) for kind in self.kinds for cell in self.cells]

    @property
    def prompt_verdict(self) -> str:
        """What a policy gains that sees the kind of text of the prompts, in words."""
        gain, unknown = (self.prompt_gain(known=known) for known in (True, False))
        return (
            f"Plans by the kind of text of the first {self.prompt_tokens} tokens have a "
            f"ΔNLL of {relative_words(gain)} relative to plans for equal shares of all kinds, and "
            f"of {relative_words(unknown)} where the text's own kind is not among the known ones."
        )

    @property
    def summary(self) -> str:
        """All verdicts."""
        return f"{self.verdict} {self.prompt_verdict}" if self._prompts else self.verdict

    def prompt_table(self) -> Table:
        """Table of `prompt_losses`, beside plans that do not depend on the prompt."""
        own = relative_ratio(
            [self.losses(k, k, [c]) for k, c in self._pairs],
            [self.prompt_losses(k, [c], known=True, general=True) for k, c in self._pairs],
        )
        rows = [
            self._prompt_row("own kind", [self.losses(k, k, self.cells) for k in self.kinds], own)
        ]
        for known in (True, False):
            clause = "" if known else ", own kind unknown"
            for name, general in (("kind of the prompt", False), ("equal shares", True)):
                losses = [
                    self.prompt_losses(k, self.cells, known=known, general=general)
                    for k in self.kinds
                ]
                gain = None if general else self.prompt_gain(known=known)
                rows.append(self._prompt_row(f"{name}{clause}", losses, gain))
        return ["Plans by", "Relative", "Mean", *self.kinds], rows

    def _prompt_row(self, name: str, losses: list[Losses], gain: Estimate | None) -> list[str]:
        return [name, relative_words(gain), f"{np.mean(losses):.3f}", *_means(losses)]

    def recognised_table(self) -> Table:
        """Table of what prompts are taken for."""
        rows = []
        for number, kind in enumerate(self.kinds):
            own, others, none, unknown = [], [], [], []
            for seed in self._seeds:
                for shares in self._prompts[seed, self.cells[0], kind, True].shares:
                    own.append(shares[number] if shares else 0.0)
                    others.append(sum(shares) - own[-1])
                    none.append(not shares)
                others_known = self._prompts[seed, self.cells[0], kind, False].shares
                unknown += [not shares for shares in others_known]
            values = (np.mean(own), np.mean(others), np.mean(none), np.mean(unknown))
            rows.append([kind, *(f"{value:.2f}" for value in values)])
        return ["Text", "Own kind", "Others", "None", "None, own kind unknown"], rows

    def agreement_table(self) -> Table:
        """Table of rank agreement between draws, by kind of item and level."""
        whole = [row for row in self._costs if row.tokens == self._tokens]
        # Two seeds may draw the same windows, which agree by themselves.
        hashes = [(row.kind, row.costs["provenance"]["text"]["sha256"]) for row in whole]
        different = dict(zip(hashes, whole, strict=True)).values()
        draws = [(row.kind, self._by_level(row.costs["one_shot"])) for row in different]
        rows = []
        for level in (level for level, costs in draws[0][1].items() if len(costs) > 1):
            taus: dict[bool, list[float]] = {True: [], False: []}
            for (kind, first), (other, second) in combinations(draws, 2):
                taus[kind == other].append(kendall_tau(first[level], second[level]))
            shown = [
                f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "-"
                for values in taus.values()
            ]
            rows.append([level, *shown])
        return ["Items and level", "Within a kind", "Between kinds"], rows

    def _by_level(self, one_shot: dict[str, dict[str, float]]) -> dict[str, list[float]]:
        """Costs of the ladder's levels by kind of item and level, and all of them.

        Levels that caches take together are left out: their costs are shares of one measurement.
        """
        ladder = self._ladder
        by_level: dict[str, list[float]] = {"all": []}
        for item, costs in one_shot.items():
            kind = item.partition(".")[2] or item
            group = {"cache": "caches", EMBEDDINGS: EMBEDDINGS}.get(kind, "weights")
            for level, cost in costs.items():
                shared = kind == "cache" and level in ladder["together"]
                if level in ladder["levels"][group] and not shared:
                    by_level["all"].append(cost)
                    by_level.setdefault(f"{kind} {level}", []).append(cost)
        return by_level

    def matrix_table(self) -> Table:
        """Table of `matrix`."""
        rows = [[name, *_means(row), f"{np.mean(row):.3f}"] for name, row in self.matrix.items()]
        return ["Chosen on", *self.kinds, "mean"], rows

    def size_table(self) -> Table:
        """Table of ΔNLL on calibration and report text, by the size of the calibration text."""
        sized, rows = self.sized, []
        for tokens in self._sizes:
            seen = float(self.losses(sized, CALIBRATION, self.cells, tokens).mean())
            report = bootstrap_mean(self.losses(sized, sized, self.cells, tokens))
            by_cell = [self.losses(sized, sized, [cell], tokens).mean() for cell in self.cells]
            shown = [f"{seen:.3f}", str(report), f"{report.mean - seen:+.3f}"]
            rows.append([f"{tokens:,}", *shown, *(f"{loss:.3f}" for loss in by_cell)])
        pinned = [parse_pinned(cell) for cell in self.cells]
        cells = [f"{shape_words(p.shape)} @ {p.budget_bytes / 2**20:.1f} MiB" for p in pinned]
        return ["Tokens", "Calibration", "Report", "Difference", *cells], rows


def _means(losses: Sequence[Losses]) -> list[str]:
    return [str(bootstrap_mean(values)) for values in losses]


def text_tables(study: TextStudy) -> list[TitledTable]:
    """All tables."""
    tables = [
        TitledTable(study.agreement_table(), "Agreement of costs", AGREEMENT),
        TitledTable(study.matrix_table(), "Plans by kind of text", MATRIX),
    ]
    if tokens := study.prompt_tokens:
        tables += [
            TitledTable(study.prompt_table(), "Plans by prompt", PROMPTS.format(tokens=tokens)),
            TitledTable(
                study.recognised_table(), "Kinds of prompts", RECOGNISED.format(tokens=tokens)
            ),
        ]
    if study.sized:
        caption = SIZES.format(sized=study.sized)
        tables.append(TitledTable(study.size_table(), "Amount of calibration text", caption))
    return tables


def chosen_and_judged(study: TextStudy, narrow: bool) -> Figure:
    """Heat map of ΔNLL by the texts that plans were chosen on and judged on."""
    loss = np.mean(list(study.matrix.values()), axis=(2, 3))
    relative = loss / np.diag(loss) - 1
    most = 2 * max(THRESHOLD, float(np.abs(relative).max()))  # twice: text stays readable
    with style():
        figure, (axis,) = panels(1, 1, narrow=narrow, height=3.2)
        axis.pcolormesh(relative, cmap="RdBu_r", vmin=-most, vmax=most, edgecolors="white")
        for (row, column), value in np.ndenumerate(loss):
            text = f"{value:.3f}\n{signed_percent(relative[row, column])}"
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
        axis.set_xticks(np.arange(len(study.kinds)) + 0.5, study.kinds)
        axis.set_yticks(np.arange(len(loss)) + 0.5, study.matrix)
        axis.set_ylim(len(loss), 0)
        axis.set(xlabel="judged on", ylabel="chosen on")
        axis.set_title("ΔNLL (nats/token), and relative to plans from the text's own kind")
        axis.grid(False)
        axis.tick_params(length=0)
    return figure


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's rank correlation tau-b of two lists, from -1 to 1; 0 if one has equal values only.

    Source: Kendall (1945), The treatment of ties in ranking problems.
    """
    rows, columns = np.triu_indices(len(first), 1)
    signs, others = (np.sign(v[rows] - v[columns]) for v in map(np.asarray, (first, second)))
    untied = float(np.abs(signs).sum() * np.abs(others).sum())
    return float(signs @ others) / float(np.sqrt(untied)) if untied else 0.0
