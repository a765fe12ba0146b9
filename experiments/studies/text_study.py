"""``python -m experiments.studies.text_study``: the gain of masks for one kind of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agents.baselines import BASELINES
from agents.baselines.base import Baseline, CountingScorer, fits, price_per_byte
from experiments.comparison.formatting import (
    Table,
    markdown,
    percent,
    publish_tables,
    signed,
    wrapped,
)
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.statistics import Estimate, bootstrap_mean, paired_difference
from experiments.config import Config
from experiments.config.common import Cell
from experiments.config.studies import TextStudyConfig
from experiments.console import say
from experiments.contexts import load_texts
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.evaluation import (
    Search,
    StudyContexts,
    StudyEvaluator,
    captioned_tables,
    gsi_identity,
)
from experiments.studies.records import StudyRow, search_evaluations
from rap_env.blocks import BlockMask
from rap_env.errors import UnknownNameError
from rap_env.importance.gsi_strategies import nearest_kept
from rap_env.llm.progress import progress_bar
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus

FILE = "text_study.jsonl"
_FROZEN = ("model", "repair", "text_study.method", "text_study.texts", "text_study.report_windows")

SHARED = "shared"
"""Name of the mask searched on a part of every kind, with as many tokens as one kind has."""
SHARED_ALL = "shared_all"
"""Name of the mask searched on the whole text of all kinds."""
OTHERS = "others"
"""Stands for the masks of the other kinds; their ΔNLL is averaged."""

Deltas = npt.NDArray[np.float64]

CAPTION = (
    "ΔNLL on held-out text of each kind (nats/token, with a 95 % interval over windows) of masks "
    "searched on each kind alone, on a part of every kind with as many tokens "
    f"({SHARED}), and on all their text ({SHARED_ALL}), mean over requests."
)
GAIN_CAPTION = (
    "ΔNLL of the mask of the text's own kind minus that of another mask, paired over windows: "
    "below 0, a mask for the kind of text helps."
)

_WIDTH = 6
_NEIGHBOURS = 2

Price = Callable[[int, float], float]
"""Nats per needed byte of a block, from its index and the rise in NLL at its removal."""


class LazyPerByteBaseline(Baseline):
    """Lazy greedy search per byte: blocks are measured again only while they may be the best.

    After a first scan of all blocks, candidates are measured in batches in order of their last
    known price, neighbours of the block removed last first, until the best measured price is not
    above the last known price of the next candidate. This is Minoux's lazy greedy algorithm (1978)
    with prices per byte; it is exact if the ΔNLL of a removal only grows as the model shrinks.
    """

    name = "lazy_per_byte"

    def _choose(self, request: Request, scores: CountingScorer) -> BlockMask:
        freed = self.memory.freed_bytes(request)
        mask, last = BlockMask(), None
        known: dict[int, float] = {}
        while not fits(self.memory, mask, request):
            over = self.memory.peak_bytes(mask, request) - request.budget_bytes

            def price(index: int, rise: float, over: int = over) -> float:
                return price_per_byte(rise, min(int(freed[index]), over))

            if last is None:
                measured = _rises(scores, mask, list(range(self.memory.facts.num_blocks)))
            else:
                measured = _promising(scores, mask, known, last, price)
            last = min(measured, key=lambda index: (price(index, measured[index]), index))
            known |= measured
            del known[last]
            mask |= BlockMask.of(last)
        return mask


def _promising(
    scores: CountingScorer, mask: BlockMask, known: Mapping[int, float], last: int, price: Price
) -> dict[int, float]:
    """Measure the rise in NLL for some kept blocks that include the best one."""
    nearest = nearest_kept(last, sorted(known))
    waiting = sorted(known, key=lambda i: (i not in nearest, price(i, known[i]), i))
    measured: dict[int, float] = {}
    width = _WIDTH + _NEIGHBOURS
    while waiting:
        now, waiting, width = waiting[:width], waiting[width:], _WIDTH
        measured |= _rises(scores, mask, now)
        best = min(price(index, rise) for index, rise in measured.items())
        if waiting and best <= price(waiting[0], known[waiting[0]]):
            break
    return measured


def _rises(scores: CountingScorer, mask: BlockMask, blocks: list[int]) -> dict[int, float]:
    """Measure the rise in NLL if each of some blocks is removed as well, nats per token."""
    nll = scores.nll(mask)
    without = scores.nll_many([mask | BlockMask.of(index) for index in blocks])
    return {index: value - nll for index, value in zip(blocks, without, strict=True)}


METHODS: dict[str, type[Baseline]] = {**BASELINES, LazyPerByteBaseline.name: LazyPerByteBaseline}


def text_study(config: Config, folder: Path) -> Path:
    """Search masks on each kind of text and on all together; evaluate each on every kind.

    Returns:
        The path of ``text_study.jsonl``.
    """
    _check(config.text_study)
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    rows = _rows(config, folder)
    evaluations = search_evaluations(rows, per_cell=config.text_study.method != "gsi")
    run.finish(started, rows=len(rows), evaluations=evaluations)
    publish_tables(folder, *TextComparison(rows).document())
    say(f"{evaluations:,} evaluations to search the masks; {len(rows)} records in {folder / FILE}.")
    return folder / FILE


def _rows(config: Config, folder: Path) -> list[StudyRow]:
    """Return a row for each text searched on, cell and report text."""
    settings, contexts = config.text_study, StudyContexts(config)
    llm, progress = contexts.own.llm, config.progress
    kinds = load_texts(settings.texts, "calibration", llm, progress=progress)
    report_texts = {
        name: replace(text, windows=settings.report_windows)
        for name, text in settings.texts.items()
    }
    report = load_texts(report_texts, "report", llm, progress=progress)
    evaluator = StudyEvaluator("text", contexts, list(kinds.values()), report, folder / FILE)
    rows: list[StudyRow] = []
    texts = searched_texts(kinds, settings).items()
    for name, corpus in progress_bar(config.progress, texts, desc="text study", unit="search"):
        rows += evaluator.rows(_search(contexts, name, corpus), settings.parsed_cells)
    return rows


def searched_texts(kinds: Mapping[str, Corpus], settings: TextStudyConfig) -> dict[str, Corpus]:
    """Return each kind alone, an equal part of each kind together, and all text."""
    windows = len(next(iter(kinds.values())).tokens)
    least, more = divmod(windows, len(kinds))
    parts = {
        name: text.spread(least + (number < more))
        for number, (name, text) in enumerate(kinds.items())
    }
    found = {**kinds, SHARED: Corpus.joined(parts)}
    if settings.all_tokens:
        found[SHARED_ALL] = Corpus.joined(kinds)
    return found


def _search(contexts: StudyContexts, name: str, corpus: Corpus) -> Search:
    method = contexts.config.text_study.method
    identity = gsi_identity(contexts.config) if method == "gsi" else {}
    seed = int(corpus.provenance.get("seed", 0))
    return Search(method, name, seed, contexts.on(corpus), METHODS[method], identity)


def _check(settings: TextStudyConfig) -> None:
    """Check the settings before anything is measured."""
    if settings.method not in METHODS:
        raise UnknownNameError("text_study.method", settings.method, METHODS)
    names = list(settings.texts)
    if len(names) < 2 or {SHARED, SHARED_ALL} & set(names) or not settings.cells:
        raise ExperimentError(
            f"text_study needs a cell, and two kinds of text with names other than {SHARED!r} "
            f"and {SHARED_ALL!r}; got the texts {names} and the cells {settings.cells}."
        )
    sizes = {name: (text.windows, text.window_tokens) for name, text in settings.texts.items()}
    windows = min(count for count, _ in sizes.values())
    if len(set(sizes.values())) > 1 or windows < len(names):
        raise ExperimentError(
            "All of text_study.texts need the same windows and window_tokens, and as many windows "
            f"as there are kinds, so that a shared text has a part of each; got {sizes}."
        )


class TextComparison:
    """The rows of one text study."""

    def __init__(self, rows: Sequence[StudyRow]) -> None:
        self._rows = {(row.searched_on, row.cell, row.text): row for row in rows}
        self.kinds = list(dict.fromkeys(row.text for row in rows))
        self.searched_on = list(dict.fromkeys(row.searched_on for row in rows))
        self.cells = list(dict.fromkeys(row.cell for row in rows))

    def deltas(self, searched_on: str, kind: str, cells: Sequence[Cell] | None = None) -> Deltas:
        """ΔNLL of a text's mask on the windows of a kind, mean over cells, (windows,).

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
        mean: Deltas = np.asarray(found, dtype=np.float64).mean(axis=0)
        return mean

    def gain(
        self, against: str, kinds: Sequence[str], cells: Sequence[Cell] | None = None
    ) -> Estimate:
        """ΔNLL of the own kind's mask minus that of another, mean over some kinds.

        The kinds have equally many windows, drawn independently, so resampling windows averaged
        over kinds is equivalent to resampling the windows of each kind.
        """
        own = np.mean([self.deltas(kind, kind, cells) for kind in kinds], axis=0)
        other = np.mean([self.deltas(against, kind, cells) for kind in kinds], axis=0)
        return paired_difference(own, other)

    @property
    def rivals(self) -> list[str]:
        """Masks that the own kind's mask is compared with."""
        return [*[name for name in self.searched_on if name not in self.kinds], OTHERS]

    def matrix_table(self, cells: Sequence[Cell] | None = None) -> Table:
        """Table of ΔNLL: texts searched on as lines, reported kinds as columns."""
        header = ["Mask searched on", *self.kinds, "mean"]
        rows = []
        for name in self.searched_on:
            deltas = [self.deltas(name, kind, cells) for kind in self.kinds]
            shown = [str(bootstrap_mean(values)) for values in deltas]
            rows.append([name, *shown, f"{np.mean(deltas):.3f}"])
        return header, rows

    def gain_table(self) -> Table:
        """Table of gains per kind and over all kinds: own mask minus each rival."""
        header = ["Held-out text", *[f"own - {name}" for name in self.rivals]]
        groups = {kind: [kind] for kind in self.kinds} | {"all kinds": self.kinds}
        rows = [
            [label, *[signed(self.gain(rival, kinds)) for rival in self.rivals]]
            for label, kinds in groups.items()
        ]
        return header, rows

    def verdict(self) -> str:
        """State the result against each rival in a sentence."""
        parts = []
        for rival in self.rivals:
            found = self.gain(rival, self.kinds)
            mean = float(np.mean([self.deltas(rival, kind) for kind in self.kinds]))
            share = found.mean / max(1e-12, mean)
            if found.high < 0:
                answer = "a gain"
            elif found.low > 0:
                answer = "a disadvantage"
            else:
                answer = "no significant gain"
            parts.append(
                f"against {rival}: {answer} ({signed(found)} nats/token, {100 * share:+.1f} %)"
            )
        return f"Effect of a mask for the kind of text: {'; '.join(parts)}."

    def document(self) -> tuple[str, str]:
        """All tables and the verdict, in Markdown (single requests too) and for the terminal."""
        tables = [(CAPTION, self.matrix_table()), (GAIN_CAPTION, self.gain_table())]
        in_markdown, in_terminal = captioned_tables("Kinds of text", tables)
        parts = [in_markdown, self.verdict() + "\n"]
        for cell in self.cells:
            title = f"## {cell[0]} x {cell[1]} tokens at {percent(cell[2], 0)}\n"
            parts += [title, markdown(self.matrix_table([cell]))]
        return "\n".join(parts), f"{in_terminal}\n\n{wrapped(self.verdict())}"


if __name__ == "__main__":
    launch("text_study", text_study)
