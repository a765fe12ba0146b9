"""``python -m experiments.studies.stability``: dependence of importance and masks on the text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.baselines import BASELINES
from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.formatting import (
    Table,
    look,
    percent,
    publish_tables,
)
from experiments.comparison.records import RowFile
from experiments.comparison.run_folder import RunFolder, TrainingRun
from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.model import ImportanceConfig
from experiments.console import say
from experiments.contexts import build_context
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.evaluation import (
    Search,
    StudyContexts,
    StudyEvaluator,
    captioned_tables,
    gsi_identity,
    reseeded,
)
from experiments.studies.records import OrderRow, StudyRow
from rap_env.blocks import block_name
from rap_env.context.base import PruningContext
from rap_env.llm.progress import progress_bar
from rap_env.scoring.corpus import Corpus

FILE, ORDERS = "stability.jsonl", "orders.jsonl"
METHODS = ("one_shot", "gsi")
REPORT = "report"
OWN_TEXT = "own text"
"""Stands for the name of the text that a policy was trained with."""

_FROZEN = ("model", "repair", "importance.gsi_method", "importance.gsi_removals")
Draw = tuple[str, int]
"""Name of a text and the seed of its windows."""


AGREEMENT_CAPTION = (
    "Kendall's tau of the importance of all blocks (one-shot) or of their positions in the order "
    "(GSI), mean over pairs of draws with minimum and maximum, and the share of the first k blocks "
    "that both orders have in common."
)
DELTA_CAPTION = (
    "ΔNLL on one report text (nats/token) of the masks that follow from the importance on each "
    "text: mean and standard deviation over draws of the text; last, the standard deviation of "
    "the means over texts."
)


def stability(config: Config, folder: Path) -> Path:
    """Measure orders on every draw of every text; evaluate their masks and those of agents.

    Returns:
        The path of ``stability.jsonl``.
    """
    settings = config.stability
    if not settings.texts or OWN_TEXT in settings.texts:
        raise ExperimentError(
            f"stability.texts needs an entry, and none may be named {OWN_TEXT!r}; got "
            f"{list(settings.texts)}."
        )
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    orders, rows = _measure(config, folder)
    evaluations = sum(order.evaluations for order in orders)
    run.finish(started, orders=len(orders), rows=len(rows), evaluations=evaluations)
    tables = [(AGREEMENT_CAPTION, agreement_table(orders, settings.top))]
    if rows:
        tables.append((DELTA_CAPTION, text_delta_table(rows)))
    publish_tables(folder, *captioned_tables("Stability", tables))
    say(f"{evaluations:,} evaluations for {len(orders)} orders; records in {folder}.")
    return folder / FILE


def _measure(config: Config, folder: Path) -> tuple[list[OrderRow], list[StudyRow]]:
    """Return the orders on every draw of every text, and the rows of all masks."""
    agents = [(Path(name), trained_with(Path(name), config)) for name in config.stability.agents]
    cells, contexts = config.stability.parsed_cells, StudyContexts(config)
    report = {REPORT: contexts.load(config.evaluate.text, "report")}
    draws = _draws(contexts)
    evaluator = StudyEvaluator("stability", contexts, list(draws.values()), report, folder / FILE)
    file = RowFile(folder / ORDERS, OrderRow)
    orders: list[OrderRow] = []
    rows: list[StudyRow] = []
    bar = progress_bar(config.progress, draws.items(), desc="stability", unit="search")
    for (name, seed), corpus in bar:
        context = contexts.on(corpus)
        orders += _orders(contexts, file, name, seed, context)
        for search in searches(contexts, name, seed, context, agents):
            rows += evaluator.rows(search, cells)
    for agent, own in agents:
        evaluator.check_disjoint([build_context(own).corpus])
        rows += evaluator.rows(_own_search(agent, own), cells)
    return orders, rows


def _orders(
    contexts: StudyContexts, file: RowFile[OrderRow], name: str, seed: int, context: PruningContext
) -> Iterator[OrderRow]:
    """Yield the orders on one text; each is measured once and stored in the file."""
    corpus = context.corpus
    for method in METHODS:
        identity = gsi_identity(contexts.config) if method == "gsi" else {}
        provenance = contexts.provenance(corpus, **identity)
        empty = OrderRow(method, name, seed, corpus.tokens.numel(), [], 0, [], 0, provenance)
        yield file.get(empty.key, partial(_measured, empty, context))


def searches(
    contexts: StudyContexts,
    name: str,
    seed: int,
    context: PruningContext,
    agents: list[tuple[Path, Config]],
) -> Iterator[Search]:
    """Yield all methods that choose masks by the importance on one text."""
    for method in METHODS:
        identity = gsi_identity(contexts.config) if method == "gsi" else {}
        yield Search(method, name, seed, context, BASELINES[method], identity)
    for folder, own in agents:
        observed = contexts.on(context.corpus, importance=own.importance.method)
        policy = partial(TrainedPolicy.load, folder)
        identity = {**_policy_identity(folder), **gsi_identity(contexts.config)}
        yield Search(folder.name, name, seed, observed, policy, identity)


def trained_with(folder: Path, config: Config) -> Config:
    """Return the settings with the text and the importance that an agent was trained with.

    Raises:
        ExperimentError: The folder holds no training run.
    """
    _ = TrainingRun(folder).facts  # raises an error if it is no training run
    settings = RunFolder(folder).settings()
    if settings is None:
        raise ExperimentError(f"{folder} has no config.yaml; give a complete run folder.")
    return replace(
        config,
        name=settings["name"],
        runs_dir=settings["runs_dir"],
        calibration=TextConfig(**settings["calibration"]),
        importance=ImportanceConfig(**settings["importance"]),
    )


def _own_search(folder: Path, own: Config) -> Search:
    """Return a policy that observes the importance that it was trained with."""
    identity = {**_policy_identity(folder), **gsi_identity(own)}
    seed = own.calibration.seed
    policy = partial(TrainedPolicy.load, folder)
    return Search(folder.name, OWN_TEXT, seed, build_context(own), policy, identity)


def _draws(contexts: StudyContexts) -> dict[Draw, Corpus]:
    """Load every text with every seed; files first, as in `experiments.contexts.load_texts`."""
    settings = contexts.config.stability
    files_first = sorted(settings.texts.items(), key=lambda item: item[1].source == "self")
    return {
        (name, seed): contexts.load(reseeded(text, seed), "calibration")
        for name, text in files_first
        for seed in settings.seeds
    }


def _measured(empty: OrderRow, context: PruningContext) -> OrderRow:
    """Return the row with the order measured on a context."""
    if empty.method == "gsi":
        profile = context.gsi
        order, values = profile.full_order, profile.rank
        measured, evaluations = len(profile.order_indices), profile.evaluations
    else:
        values = context.one_shot.delta_nll
        order = tuple(int(index) for index in np.argsort(values, kind="stable"))
        measured, evaluations = len(order), context.one_shot.evaluations
    return replace(
        empty,
        order=[block_name(index) for index in order],
        measured=measured,
        values=values.tolist(),
        evaluations=evaluations,
    )


def _policy_identity(folder: Path) -> Mapping[str, Any]:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    found = {} if checkpoint is None else {"step": checkpoint.step, **checkpoint.body["files"]}
    return {"run": folder.name, "checkpoint": found}


@dataclass(frozen=True)
class OrderAgreement:
    """Agreement of two orders of one method, on two texts or on two draws of one text.

    Attributes:
        method: ``"one_shot"`` or ``"gsi"``.
        texts: Names of the two texts; equal for two draws of one text.
        tau: Kendall's tau-b, in [-1, 1].
        overlaps: By k: share of the first k blocks that both orders have, in [0, 1].
    """

    method: str
    texts: tuple[str, str]
    tau: float
    overlaps: dict[int, float]

    @property
    def same_text(self) -> bool:
        """Whether only the draw of the windows differs."""
        return self.texts[0] == self.texts[1]


def agreements(orders: Sequence[OrderRow], top: Sequence[int]) -> Iterator[OrderAgreement]:
    """Yield the agreement of every pair of orders of the same method.

    Args:
        orders: The orders.
        top: Lengths k of the compared prefixes; those beyond what both orders measured are
            left out.
    """
    for one, two in combinations(orders, 2):
        if one.method == two.method:
            known = min(one.measured, two.measured)
            yield OrderAgreement(
                one.method,
                (one.searched_on, two.searched_on),
                kendall_tau(one.values, two.values),
                {k: overlap(one.order, two.order, k) for k in top if k <= known},
            )


def kendall_tau(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kendall's rank correlation tau-b of two lists of numbers.

    Source: Kendall (1945), The treatment of ties in ranking problems. With C and D the numbers
    of pairs that both lists order the same way and the opposite way, and T_i those that list i
    does not tie: tau = (C - D) / sqrt(T_1 T_2).

    Args:
        first: Shape (N,).
        second: Shape (N,).

    Returns:
        From -1 (reversed) to 1 (the same order); 0 if all values of a list are equal.

    Raises:
        ValueError: The lists differ in length, or have fewer than two numbers.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 1 or len(one) < 2:
        raise ValueError(
            f"Kendall's tau needs two lists of one length with at least two numbers; got shapes "
            f"{one.shape} and {two.shape}."
        )
    pairs = np.triu_indices(len(one), 1)
    signs = [np.sign(values[pairs[0]] - values[pairs[1]]) for values in (one, two)]
    untied = [float(np.abs(sign).sum()) for sign in signs]
    return (
        float(signs[0] @ signs[1]) / float(np.sqrt(untied[0] * untied[1])) if all(untied) else 0.0
    )


def overlap(first: Sequence[str], second: Sequence[str], k: int) -> float:
    """Share of the first `k` entries that two orders have in common, in any order."""
    return len(set(first[:k]) & set(second[:k])) / k


def agreement_table(orders: Sequence[OrderRow], top: Sequence[int]) -> Table:
    """Table of the agreement between draws of one text, and between texts."""
    found = list(agreements(orders, top))
    known = sorted({k for pair in found for k in pair.overlaps})
    header = ["Importance", "Texts", "Pairs", "Kendall's tau", *[f"first {k}" for k in known]]
    rows = []
    for method in dict.fromkeys(pair.method for pair in found):
        for name, pairs in _groups([pair for pair in found if pair.method == method]).items():
            taus = [pair.tau for pair in pairs]
            spread = f"{np.mean(taus):.2f} [{min(taus):.2f}, {max(taus):.2f}]"
            shares = [_mean_overlap(pairs, k) for k in known]
            rows.append([look(method).label, name, f"{len(pairs)}", spread, *shares])
    return header, rows


def text_delta_table(rows: Sequence[StudyRow]) -> Table:
    """Table of ΔNLL: one line per method and cell, one column per text."""
    texts = list(dict.fromkeys(row.searched_on for row in rows))
    header = ["Method", "Request", *texts, "over texts"]
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        for cell in dict.fromkeys(row.cell for row in rows):
            own = [row for row in rows if (row.method, row.cell) == (method, cell)]
            by_text = {t: [r.loss for r in own if r.searched_on == t] for t in texts}
            means = [float(np.mean(deltas)) for deltas in by_text.values() if deltas]
            name = f"{cell[0]}x{cell[1]} @ {percent(cell[2], 0)}"
            lines.append(
                [look(method).label, name, *map(_mean_and_spread, by_text.values()),
                 f"{np.std(means):.3f}"]
            )  # fmt: skip
    return header, lines


def _groups(pairs: Sequence[OrderAgreement]) -> dict[str, list[OrderAgreement]]:
    """Group pairs by what they compare; the groups over all texts come first."""
    groups: dict[str, list[OrderAgreement]] = {
        "same text, other draw": [pair for pair in pairs if pair.same_text],
        "other text": [pair for pair in pairs if not pair.same_text],
    }
    for pair in pairs:
        one, two = pair.texts
        name = f"{one}, other draw" if pair.same_text else f"{one} - {two}"
        groups.setdefault(name, []).append(pair)
    return {name: group for name, group in groups.items() if group}


def _mean_overlap(pairs: Sequence[OrderAgreement], k: int) -> str:
    shares = [pair.overlaps[k] for pair in pairs if k in pair.overlaps]
    return percent(float(np.mean(shares)), 0) if shares else "-"


def _mean_and_spread(deltas: Sequence[float]) -> str:
    return f"{np.mean(deltas):.3f} ± {np.std(deltas):.3f}" if deltas else "-"


if __name__ == "__main__":
    launch("stability", stability)
