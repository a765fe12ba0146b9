"""Score tables: which masks are measured for them, which scores are recorded, how they are made.

The first ones are the native model, every single removal, and the model without all attention
blocks, all FFN blocks or all blocks. Further masks are drawn in fixed shares:

| kind | share | masks |
|------|-------|-------|
| `random` | 20 % | any blocks, every number of removals equally likely |
| `order` | 40 % | a prefix of a noisy importance order, similar to masks of trained agents |
| `episode` | 30 % | all prefixes of such an order, similar to the states of an episode |
| `pair` | 10 % | two or three blocks, to measure interactions |

An order is an importance order (GSI or one-shot) with normal noise added to each block's position
in [0, 1]; the standard deviation is drawn from `TEMPERATURES`. Orders are cut after at most a
share of `DEEPEST` of the blocks, more than any practical budget requires.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.config import Config
from experiments.contexts import FRONTIER_FILE
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records
from rap_env.context.base import PruningContext
from rap_env.context.opening import require_live
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.held_out import HeldOutLosses
from rap_env.scoring.score_table import ScoreTable

SHARES = {"random": 0.2, "order": 0.4, "episode": 0.3, "pair": 0.1}

TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Standard deviations of the noise on a block's position, as shares of the order."""

DEEPEST = 0.6
"""Maximum share of blocks that `order` and `episode` remove."""

ROUNDS_FILE = "rounds.jsonl"
"""Measured and predicted scores of the policy's plans after each round."""

Folders = Sequence[str | os.PathLike[str]]

_Indices = npt.NDArray[np.int64]


def planned_masks(num_blocks: int, orders: Sequence[Sequence[int]], seed: int) -> Iterator[Plan]:
    """Yield masks without repetition and without end; equal arguments give equal masks.

    Callers must not request more masks than the model has, because the iterator then never returns.

    Args:
        num_blocks: 2L.
        orders: Importance orders, each of all block indices, least important first.
        seed: Seed of the random masks.
    """
    seen: set[Plan] = set()
    for mask in _drawn(num_blocks, orders, seed):
        if mask not in seen:
            seen.add(mask)
            yield mask


def _drawn(num_blocks: int, orders: Sequence[Sequence[int]], seed: int) -> Iterator[Plan]:
    everything = range(num_blocks)
    yield Plan()
    yield from (Plan.removing(index) for index in everything)
    yield from (Plan.removing(*part) for part in (everything[::2], everything[1::2], everything))
    rng = np.random.default_rng(seed)
    draw = _draws(num_blocks, [np.argsort(order) for order in orders])
    count = dict.fromkeys(SHARES, 0)
    while True:
        # The one with the largest deficit.
        kind = min(SHARES, key=lambda name: count[name] / SHARES[name])
        masks = draw[kind](rng)
        count[kind] += len(masks)
        yield from (Plan.removing(*mask.tolist()) for mask in masks)


def _draws(
    num_blocks: int, places: Sequence[_Indices]
) -> dict[str, Callable[[np.random.Generator], list[_Indices]]]:
    """Return a function for each kind of `SHARES` that draws masks of it."""
    deepest = max(1, round(DEEPEST * num_blocks))

    def shuffled(rng: np.random.Generator) -> _Indices:
        place = places[int(rng.integers(len(places)))] / num_blocks
        noise = rng.normal(scale=rng.choice(TEMPERATURES), size=num_blocks)
        cut = rng.integers(1, deepest + 1)
        return np.argsort(place + noise, kind="stable")[:cut]

    def prefixes(rng: np.random.Generator) -> list[_Indices]:
        order = shuffled(rng)
        return [order[: end + 1] for end in range(len(order))]

    def some(rng: np.random.Generator, least: int, most: int) -> _Indices:
        return rng.permutation(num_blocks)[: rng.integers(least, most + 1)]

    return {
        "random": lambda rng: [some(rng, 1, num_blocks)],
        "order": lambda rng: [shuffled(rng)],
        "episode": prefixes,
        "pair": lambda rng: [some(rng, 2, min(3, num_blocks))],
    }


def table_of(
    config: Config,
    context: PruningContext,
    scores: Mapping[Plan, float],
    *,
    levels: LevelCosts | None = None,
    held_out: HeldOutLosses | None = None,
    **model: Any,
) -> ScoreTable:
    """Make a score table from scores of a context.

    Args:
        config: All settings.
        context: What the scores were measured with.
        scores: Mean NLL of plans, nats per token.
        levels: Costs of levels, from which plans are predicted; None predicts masks only.
        held_out: Losses on held-out text, if some were measured.
        **model: ``members`` and ``pessimism`` of the score model.

    Raises:
        ArtifactError: There are too few scores.
    """
    scorer, features = context.scorer, context.features
    with_gsi = config.importance.method == "gsi"
    arrays = {name: array.tolist() for name, array in vars(features).items()}
    return ScoreTable.fitted(
        context.memory.facts,
        scores,
        seed=config.seed,
        lowered=None if levels is None else levels.delta_nll,
        levels=None if levels is None else asdict(levels),
        held_out=held_out,
        **model,
        context=dict(scorer.context),
        text=context.corpus.provenance,
        settings=_settings(config, context),
        features=arrays,
        one_shot=asdict(context.one_shot),
        gsi=asdict(context.gsi) if with_gsi else None,
        evaluation_s=scorer.evaluation_s,
    )


def _settings(config: Config, context: PruningContext) -> dict[str, Any]:
    """Return the settings recorded in the table; they contain no local path."""
    text = asdict(CorpusConfig(**asdict(config.calibration), role="calibration"))
    text["source"] = context.corpus.provenance["source"]
    del text["sha256"]  # `ScoreTable.text` has it
    return {
        "device": context.llm.device.type,
        "dtype": context.memory.facts.dtype,
        "calibration": text,
        "importance": config.importance.method,
        "gsi_removals": config.importance.gsi_removals,
        "gsi_method": config.importance.gsi_method,
    }


def stored_scores(context: PruningContext) -> dict[Plan, float]:
    """Return the mean NLL of all stored plans of this model and text, nats per token.

    Args:
        context: A context of a live model with a store.
    """
    from rap_env.scoring.scorer import METRIC

    store, scorer = context.store, require_live(context).scorer
    assert store is not None
    return {plan: float(np.mean(nll)) for plan, nll in store.rows(scorer.context, METRIC)}


def importance_orders(context: PruningContext, config: Config) -> list[Sequence[int]]:
    """Return the importance orders from which masks are drawn."""
    alone = np.argsort(context.one_shot.delta_nll, kind="stable").tolist()
    return [context.gsi.full_order, alone] if config.importance.method == "gsi" else [alone]


def native_shift(table: PlanTable, path: str, context: PruningContext) -> float:
    """Return what to add to a table's NLL to compare it with what the context measures.

    Machines differ in the last digits, so the table's rises over the native model are kept, on top
    of the native model's NLL here; nats per token, 0 on the machine that measured the table.

    Raises:
        ExperimentError: The table was measured on other text.
    """
    measured = table.provenance["scoring"]["tokens"]
    here = context.scorer.context["tokens"]
    if measured != here:
        raise ExperimentError(
            f"{path} was measured on other text (SHA-256 {measured[:12]}) than the calibration "
            f"text ({here[:12]}); use its settings of the calibration text. Text that a model "
            "writes itself differs between machines: measure a table of your own with "
            "`python -m experiments.profile`."
        )
    return context.scorer.dense_nll - table.dense_nll


def scored_masks(record: Mapping[str, Any]) -> dict[Plan, float]:
    """Return the NLL of the plans that a round scored, nats per token."""
    return {Plan.of_record(plan): nll for plan, nll in record["scored"]}


def recorded_scores(folders: Folders, context: PruningContext) -> dict[Plan, float]:
    """Return the mean NLL of all plans that comparisons recorded, nats per token.

    So that scores of several machines go together, each has its own rise; see `native_shift`.

    Args:
        folders: Folders of comparisons, with the table of their profile, their training runs, or
            their evaluation.
        context: The model and text that they must have been measured with.

    Raises:
        ExperimentError: A folder has no scores, or they were measured on another text.
        ArtifactError: A table is of another model, or damaged.
    """
    nll_by_plan: dict[Plan, float] = {}
    for folder in map(Path, folders):
        own = _table_scores(folder, context)
        for row in _rows(folder, context):
            own.setdefault(row.plan, row.calibration_delta_nll + context.scorer.dense_nll)
        if not own:
            raise ExperimentError(
                f"{folder} has no recorded scores of this model and calibration text."
            )
        nll_by_plan |= own
    return nll_by_plan


def _table_scores(folder: Path, context: PruningContext) -> dict[Plan, float]:
    """Return the scores of a comparison's table and training runs; none without a table."""
    path = folder / "profile" / FRONTIER_FILE
    if not path.is_file():
        return {}
    table = PlanTable.load(path, context.memory)
    shift = native_shift(table, str(path), context)
    nll_by_plan = dict(table.scores)
    for path in sorted(folder.glob(f"train/*/{ROUNDS_FILE}")):
        for record in read_records(path):
            nll_by_plan |= scored_masks(record)
    return {plan: nll + shift for plan, nll in nll_by_plan.items()}


def held_out_losses(folders: Folders, context: PruningContext) -> HeldOutLosses | None:
    """Return what the plans of some comparisons lose on the held-out text that most of them report.

    Args:
        folders: As for `recorded_scores`.
        context: The model and calibration text of the comparisons.

    Returns:
        None if no plan was evaluated.

    Raises:
        ArtifactError: There are too few plans to predict others.
    """
    rows = [row for folder in map(Path, folders) for row in _rows(folder, context)]
    texts = Counter(row.depends_on["report_sha256"] for row in rows)
    if not texts:
        return None
    text = texts.most_common(1)[0][0]
    rows = [row for row in rows if row.depends_on["report_sha256"] == text]
    losses = {row.plan: row.delta_nll for row in rows}
    calibration = {row.plan: row.calibration_delta_nll for row in rows}
    provenance = rows[0].depends_on["report_text"]
    return HeldOutLosses.fitted(provenance, losses, calibration, context.memory.facts.num_blocks)


def _rows(folder: Path, context: PruningContext) -> list[ResultRow]:
    """Return a comparison's rows of the same model and calibration text."""
    facts, here = context.memory.facts, context.corpus.sha256
    own = {"model_fingerprint": facts.fingerprint, "calibration_sha256": here}
    return [row for row in rows_below(folder) if own.items() <= row.depends_on.items()]
