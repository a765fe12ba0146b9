"""``python -m experiments.studies.stability``: how much importance and masks depend on the text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.checkpoint import latest_checkpoint
from agents.trained_policy import TrainedPolicy
from experiments.comparison.formatting import (
    publish_tables,
)
from experiments.comparison.records import append_record
from experiments.comparison.run_folder import (
    RunFolder,
    method_and_seed,
)
from experiments.config import Config, ImportanceConfig, TextConfig
from experiments.console import say
from experiments.contexts import build_context
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.rows import OrderRow, StudyRow
from experiments.studies.setup import (
    Judge,
    Maker,
    Search,
    StudyBench,
    all_disjoint,
    bar,
    baseline_maker,
    gsi_identity,
    reseeded,
)
from experiments.studies.stability_tables import stability_markdown, stability_text
from rap_env.blocks import block_name
from rap_env.context.base import PruningContext
from rap_env.scoring.corpus import Corpus

FILE, ORDERS = "stability.jsonl", "orders.jsonl"
METHODS = ("one_shot", "gsi")
REPORT = "report"
OWN_TEXT = "own text"
"""Instead of a text's name: that a policy was trained with."""

_FROZEN = ("model", "repair", "importance.gsi_method", "importance.gsi_removals")
Draw = tuple[str, int]
"""Name of a text and the seed of its windows."""


def stability(config: Config, folder: Path) -> Path:
    """Measure orders on every draw of every text, and judge what they and the agents choose.

    Args:
        config: All settings.
        folder: Where ``orders.jsonl``, ``stability.jsonl`` and ``tables.md`` go.

    Returns:
        The path of ``stability.jsonl``.

    Raises:
        RapError: A setting cannot be, a text is too short or overlaps with the report text, a
            budget cannot be met, or a record is damaged.
    """
    settings = config.stability
    if not settings.texts or OWN_TEXT in settings.texts:
        raise ExperimentError(
            f"stability.texts needs an entry at least, and none named {OWN_TEXT!r}; got "
            f"{list(settings.texts)}."
        )
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    orders, rows = _measure(config, folder)
    evaluations = sum(order.evaluations for order in orders)
    run.finish(started, orders=len(orders), rows=len(rows), evaluations=evaluations)
    top = settings.top
    publish_tables(folder, stability_markdown(orders, rows, top), stability_text(orders, rows, top))
    say(f"{evaluations:,} evaluations for {len(orders)} orders; records in {folder}.")
    return folder / FILE


def _measure(config: Config, folder: Path) -> tuple[list[OrderRow], list[StudyRow]]:
    """Orders on every draw of every text, and rows of all masks."""
    agents = [(Path(name), trained_with(Path(name), config)) for name in config.stability.agents]
    cells, bench = config.stability.parsed_cells, StudyBench(config)
    report = {REPORT: bench.load(config.evaluate.text, "report")}
    draws = _draws(bench)
    all_disjoint(list(draws.values()), list(report.values()))
    judge = Judge("stability", bench, report, folder / FILE)
    orders = Orders(bench, folder / ORDERS)
    rows: list[StudyRow] = []
    for (name, seed), corpus in bar(config, "stability", list(draws.items())):
        context = bench.on(corpus)
        orders.measure(name, seed, context)
        for search in searches(bench, name, seed, context, agents):
            rows += judge.rows(search, cells)
    for agent, own in agents:
        all_disjoint([build_context(own).corpus], list(report.values()))
        rows += judge.rows(_own_search(agent, own), cells)
    return orders.rows, rows


class Orders:
    """Orders of importance, each measured once and kept in a file.

    Args:
        bench: The live parts.
        path: The file.
    """

    def __init__(self, bench: StudyBench, path: Path) -> None:
        self._bench, self._path = bench, path
        self._found = {row.key: row for row in OrderRow.read(path)}
        self.rows: list[OrderRow] = []

    def measure(self, name: str, seed: int, context: PruningContext) -> None:
        """Put the orders on one text among the rows."""
        corpus = context.corpus
        for method in METHODS:
            identity = gsi_identity(self._bench.config) if method == "gsi" else {}
            provenance = self._bench.provenance(corpus, **identity)
            empty = OrderRow(method, name, seed, corpus.tokens.numel(), [], 0, [], 0, provenance)
            if empty.key not in self._found:
                row = replace(empty, **_measured(method, context))
                append_record(self._path, row.to_record())
                self._found[row.key] = row
            self.rows.append(self._found[empty.key])


def searches(
    bench: StudyBench,
    name: str,
    seed: int,
    context: PruningContext,
    agents: list[tuple[Path, Config]],
) -> Iterator[Search]:
    """All that choose masks by what one text says."""
    for method in METHODS:
        identity = gsi_identity(bench.config) if method == "gsi" else {}
        yield Search(method, name, seed, context, baseline_maker(method), identity)
    for folder, own in agents:
        seen = bench.on(context.corpus, importance=own.importance.method)
        identity = {**_policy_identity(folder), **gsi_identity(bench.config)}
        yield Search(folder.name, name, seed, seen, _policy(folder), identity)


def trained_with(folder: Path, config: Config) -> Config:
    """The settings with the text and the importance that an agent was trained with.

    Raises:
        ExperimentError: The folder holds no training run.
    """
    method_and_seed(folder)
    settings = RunFolder(folder).settings()
    if settings is None:
        raise ExperimentError(f"{folder} has no config.yaml; give a whole run folder.")
    return replace(
        config,
        name=settings["name"],
        runs_dir=settings["runs_dir"],
        calibration=TextConfig(**settings["calibration"]),
        importance=ImportanceConfig(**settings["importance"]),
    )


def _own_search(folder: Path, own: Config) -> Search:
    """A policy that is shown the importance that it was trained with."""
    identity = {**_policy_identity(folder), **gsi_identity(own)}
    seed = own.calibration.seed
    return Search(folder.name, OWN_TEXT, seed, build_context(own), _policy(folder), identity)


def _draws(bench: StudyBench) -> dict[Draw, Corpus]:
    """Every text with every seed; what the model has to write comes last."""
    settings = bench.config.stability
    files_first = sorted(settings.texts.items(), key=lambda item: item[1].source == "self")
    return {
        (name, seed): bench.load(reseeded(text, seed), "calibration")
        for name, text in files_first
        for seed in settings.seeds
    }


def _measured(method: str, context: PruningContext) -> dict[str, Any]:
    """What an order's record says beside its origin."""
    if method == "gsi":
        profile = context.gsi
        order, values = profile.full_order, profile.rank
        measured, evaluations = len(profile.order_indices), profile.evaluations
    else:
        values = context.one_shot.loss_rise
        order = tuple(int(index) for index in np.argsort(values, kind="stable"))
        measured, evaluations = len(order), context.one_shot.evaluations
    return {
        "order": [block_name(index) for index in order],
        "measured": measured,
        "values": values.tolist(),
        "evaluations": evaluations,
    }


def _policy(folder: Path) -> Maker:
    def make(context: PruningContext) -> tuple[Any, int]:
        return TrainedPolicy.load(folder, context), 0

    return make


def _policy_identity(folder: Path) -> Mapping[str, Any]:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    found = {} if checkpoint is None else {"step": checkpoint.step, **checkpoint.body["files"]}
    return {"run": folder.name, "checkpoint": found}


if __name__ == "__main__":
    launch("stability", stability)
