"""Baselines and policies on the tasks across models: ``python -m experiments.unseen``.

It searches plans of the training models, trains networks that predict losses and policies, and
evaluates everything. A stopped run continues: networks are kept in ``runs/unseen`` and results in
the record, which has how often the test part was evaluated.

With ``--part Real``, networks choose plans of real models, from native weights to four bits and
removal, without a run. At the five budgets, the known costs of the levels of the order by cost per
byte add up to `ORDER_LOSSES`; what plans lose is measured on WikiText. Costs come from the package,
or from ``rap_env.importance.preparation.prepare("qwen2.5-coder-0.5b", thorough=True)``.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import gymnasium
import numpy as np
import torch

import rap_env
from agents import plan_searches, unseen
from agents.plan_searches import Bench, variant
from experiments.study.json_records import read_json, write_text
from experiments.study.plotting import FAINT, Panel, draw_series, look, panel_figure
from experiments.study.statistics import Estimate
from rap_env.context.opening import open_store
from rap_env.leaderboard.unseen import ORDER_LOSSES, PARTS, SHAPE, ModelResult, UnseenEvaluation
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.method import Basis
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

RECORD, NETWORKS = Path("results/unseen/record.json"), Path("runs/unseen")
TASKS = {part: f"RAPLadder/Unseen-{part}-v1" for part in ("Train", "Tune", "Test")}
RUNS, PREDICTED = (0, 8, 64), 1_500
POLICY, ORDER = "Policy", "Order by cost per byte"
MODELS = len(PARTS[TASKS["Train"]])
UNIFORM = [{"ffn": ffn, "depth": depth} for ffn in (0.0, 100.0) for depth in (1, -1)]
"""Settings of `plan_searches.Uniform`, of which the best on the training models is taken."""


def benches(task: str, models: int | None = None) -> list[Bench]:
    """Each model of a task, or the first ones, with the requests of its episodes."""
    across: Any = gymnasium.make(task, every_level=True, disable_env_checker=True).unwrapped
    return [Bench.of(across.env_of(model)) for model in across.models[:models]]


REAL = {
    "smollm2-135m@pypi": ("score_table:smollm2-135m", "RAPLadder/SmolLM2-Table-v1"),
    "gemma3-270m": ("score_table:gemma3-270m", "RAPLadder/Gemma3-270M-Table-v1"),
    "qwen2.5-coder-0.5b": ("qwen2.5-coder-0.5b", None),
}
"""Real models, with what has their costs of single levels, and the task whose table has thousands
of measured plans, if there is one."""

OF_TABLES = "uniform", "frontier", "score_model"
"""Methods that choose among or from measured plans of a model."""


class UnseenRecord:
    """The results so far, in a file; what is in it is not evaluated again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = read_json(path, made_by="python -m experiments.unseen")
        self.body: dict[str, Any] = known or {"test_evaluations": 0, "rows": [], "real": {}}

    def rows(self, **key: Any) -> list[dict[str, Any]]:
        """The rows with some entries."""
        return [row for row in self.body["rows"] if key.items() <= row.items()]

    def estimate(self, name: str, runs: int, part: str = "Test", **key: Any) -> Estimate | None:
        """Geometric mean over seeds and models with an interval over models; None without any."""
        own = {"trained_on": MODELS, **key} if name == POLICY else key
        rows = self.rows(name=name, runs=runs, part=part, **own)
        if not rows:
            return None
        scores = [[ModelResult(**model).score for model in row["models"]] for row in rows]
        means = np.exp(np.log(scores).mean(axis=0)).tolist()
        models = tuple(ModelResult("", (mean,), (1.0,)) for mean in means)
        result = UnseenEvaluation(name, part, "test", runs, models)
        return Estimate(result.score, *result.interval, len(rows))

    @property
    def names(self) -> list[str]:
        """The methods that were judged, the one that loses least without a run first."""
        judged = {row["name"] for row in self.rows(part="Test")}
        made = [(estimate.mean, n) for n in judged if (estimate := self.estimate(n, 0))]
        return [name for _, name in sorted(made)]

    def by_seed(self, name: str) -> str:
        """The scores without a run on the part to be judged on, by seed."""
        rows = self.rows(name=name, runs=0, part="Test", trained_on=MODELS)
        return ", ".join(f"{row['score']:.3f}" for row in rows)

    def evaluate(
        self, policy: Any, key: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> float:
        """Evaluate a policy on a part's test text, keep the result, and return its score.

        Args:
            policy: The policy.
            key: Its ``name``, the ``part``, the ``runs``, and what else tells rows apart.
            facts: What else is in the row. If ``trained_on`` is among `key`, only so many models
                of the training part count.
        """
        if known := self.rows(**key):
            return float(known[0]["score"])
        part, runs = key["part"], key["runs"]
        self.body["test_evaluations"] += part == "Test"
        result: Any = rap_env.evaluate(policy, TASKS[part], "test", name=key["name"], runs=runs)
        if part == "Train" and "trained_on" in key:
            result = replace(result, models=result.models[: key["trained_on"]])
        log.info("%s", str(result).partition("\n")[0])
        row = {
            **key,
            **(facts or {}),
            "score": result.score,
            "interval": result.interval,
            "models": [asdict(each) for each in result.models],
        }
        self.body["rows"].append(row)
        self.save()
        return float(result.score)

    def save(self) -> None:
        """Write the file; after a kill it is the old or the new one."""
        write_text(self.path, json.dumps(self.body) + "\n")


def trained(models: int, seed: int) -> tuple[dict[str, type[plan_searches.Tries]], dict[str, Any]]:
    """The methods with networks by name, and facts of their training, which is done once."""
    path = NETWORKS / f"{models}-{seed}.pt"
    if not path.exists():
        began = time.process_time()
        trained_on = benches(TASKS["Train"], models)
        for bench in trained_on:
            bench.search(np.random.default_rng(seed), noisy=16, rounds=8, offspring=8)
        critics = unseen.predictors(trained_on, count=3, updates=PREDICTED, seed=seed)
        actors = unseen.policy(trained_on, seed=seed)
        facts = {
            "cpu_s": round(time.process_time() - began),
            "plans": sum(len(bench.losses) for bench in trained_on),
        }
        log.info("Trained on %d models, seed %d: %s", models, seed, facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        states = [[each.state_dict() for each in networks] for networks in (actors, critics)]
        torch.save((*states, facts), path)
    *states, facts = torch.load(path, weights_only=True)
    actors, critics = (unseen.new_networks(len(each), seed) for each in states)
    for network, state in zip(actors + critics, itertools.chain(*states), strict=True):
        network.load_state_dict(state)
    methods = {
        POLICY: variant(unseen.ActorCritic, actors=actors, critics=critics),
        "Actor alone": variant(unseen.Corrected, actors=actors),
        "Regression": variant(unseen.Predicted, critics=critics),
    }
    return methods, facts


@click.command(help=__doc__)
@click.option("--part", type=click.Choice([*TASKS, "Real"]), default="Tune")
@click.option("--seeds", default="0", help="Seeds of policies, separated by commas.")
@click.option("--models", default="44", help="Numbers of training models, separated by commas.")
@click.option("--runs", "numbers", default="0,8,64", help="Runs, separated by commas.")
@click.option("--text", default="data/wikitext/validation.jsonl", help="For real models.")
def main(part: str, seeds: str, models: str, numbers: str, text: str) -> None:
    """Train, evaluate, and write the record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    record, runs = UnseenRecord(RECORD), [*map(int, numbers.split(","))]
    if part == "Real":
        config = CorpusConfig(text, 8, 256, seed=1, field="page", role="report")
        for model in [model for model in REAL if model not in record.body["real"]]:
            record.body["real"][model] = results(model, record, int(seeds), config)
            record.save()
        return
    baselines(record, part, runs)
    for trained_on, seed in itertools.product(*(map(int, n.split(",")) for n in (models, seeds))):
        methods, facts = trained(trained_on, seed)
        own = {"seed": seed, "trained_on": trained_on}
        if seed:
            del methods["Actor alone"]
        else:
            key = {"name": POLICY, "part": "Train", "runs": 0, **own}
            record.evaluate(methods[POLICY], key, facts)
        cells = itertools.product(methods, runs) if trained_on == MODELS else [(POLICY, 0)]
        for name, number in cells:
            key = {"name": name, "part": part, "runs": number}
            key |= own if name == POLICY else {"seed": seed}
            record.evaluate(methods[name], key, facts if name == POLICY else None)


def tuned_uniform(record: UnseenRecord) -> type[plan_searches.Tries]:
    """The best of `UNIFORM` on the training models."""

    def score(given: Mapping[str, Any]) -> float:
        key = {"name": "Uniform", "part": "Train", "runs": 0, **given}
        return record.evaluate(variant(plan_searches.Uniform, **given), key)

    return variant(plan_searches.Uniform, **min(UNIFORM, key=score))


def baselines(record: UnseenRecord, part: str, runs: Sequence[int]) -> None:
    """Evaluate what is not trained."""
    without_runs = {
        "Uniform": tuned_uniform(record),
        "Knapsack": "knapsack",
        "Quadratic knapsack": plan_searches.CrossTerms,
    }
    for name, method in without_runs.items():
        record.evaluate(method, {"name": name, "part": part, "runs": 0})
    with_runs = {
        "Noisy orders": plan_searches.NoisyOrders,
        "Noisy knapsacks": variant(unseen.Corrected, actors=unseen.new_networks(1, 0)),
        "Random orders": variant(plan_searches.NoisyOrders, scales=(100.0, 100.0)),
        "Evolution": plan_searches.Evolved,
    }
    for name, number in itertools.product(with_runs, runs):
        record.evaluate(with_runs[name], {"name": name, "part": part, "runs": number})


def requests_of(basis: Basis) -> list[Request]:
    """Requests with the largest budgets at which the order's costs add up to `ORDER_LOSSES`."""
    order, costs = make_method("cost_per_byte", *basis), basis.ladder_bytes.costs(*SHAPE)
    sizes = np.linspace(costs.native_peak_bytes - 1, costs.least_peak_bytes, 100).astype(int)
    requests = [Request(*SHAPE, size) for size in sizes.tolist()]
    of_level = basis.context.level_costs(basis.ladder_bytes.ladder)
    sums = np.array([of_level.delta_nll(order.choose(request)) for request in requests])
    return [requests[int(np.argmax(sums >= loss))] for loss in ORDER_LOSSES]


def methods_of(basis: Basis, task: str | None, record: UnseenRecord, seed: int) -> dict[str, Any]:
    """The methods that are judged on a real model, by name."""
    made = {ORDER: "cost_per_byte", "Knapsack": "knapsack"}
    methods: dict[str, Any] = {name: make_method(of, *basis) for name, of in made.items()}
    learned = {"Uniform": tuned_uniform(record), **trained(MODELS, seed)[0]}
    methods |= {name: kind(basis) for name, kind in learned.items()}
    if task is not None:
        table: Any = gymnasium.make(task).unwrapped
        known = Basis(table.context, table.encoder.ladder_bytes)
        methods |= {look(of).label: make_method(of, *known) for of in OF_TABLES}
    return methods


def results(model: str, record: UnseenRecord, seed: int, text: CorpusConfig) -> dict[str, Any]:
    """Budgets, and plans of all methods with what they lose on windows of a real model's text."""
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
    native, made = scorer.window_nll(Plan()), {}
    for name, method in methods_of(basis, task, record, seed).items():
        plans = [method.choose(request) for request in requests]
        scorer.nll_many(plans)
        rises = [scorer.window_nll(plan) - native for plan in plans]
        log.info("%s, %s: %s", model, name, np.mean(rises, axis=1).round(3))
        levels = [dict(plan.levels) for plan in plans]
        made[name] = {"plans": levels, "delta_nll": np.round(rises, 5).tolist()}
    budgets_bytes = [request.budget_bytes for request in requests]
    return {"budgets_bytes": budgets_bytes, "text": scorer.corpus.sha256, "methods": made}


def generalisation(record: UnseenRecord) -> Figure:
    """Draw the score of the policy without a run against the number of training models."""
    numbers = sorted({row["trained_on"] for row in record.rows(name=POLICY)})

    def draw(axis: Axes) -> None:
        for part, label, method, beside in (
            ("Test", "16 held-out models", "rap", 1.0),
            ("Train", "its own training models", "knapsack", 1.03),
        ):
            made = [record.estimate(POLICY, 0, part, trained_on=number) for number in numbers]
            known = [estimate for estimate in made if estimate]
            ends, looks = [(e.low, e.high) for e in known], {"label": label, "capsize": 3}
            places, means = [beside * number for number in numbers], [e.mean for e in known]
            draw_series(axis, places, means, ends, color=look(method).colour, **looks)
        axis.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks(numbers, map(str, numbers))
        axis.minorticks_off()

    return panel_figure([Panel(draw, x="training models", y="loss / the order's")], legend=2)


if __name__ == "__main__":
    main()
