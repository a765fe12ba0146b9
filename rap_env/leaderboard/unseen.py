"""The tasks `RAPLadder/Unseen-*`: models to train on, to tune on, and to be judged on.

A score compares a policy with `cost_per_byte` (`rap_env.policies.searches`), which adds up the
costs of single items: 1 is as good as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rap_env.artifacts import package_json
from rap_env.leaderboard.tasks import Floats
from rap_env.plan import Plan
from rap_env.request import Request, whole_number
from rap_env.reward import ceiling_nll
from rap_env.scoring.corpus import CorpusConfig

_FIXED = package_json(__package__, "unseen.json")
ARGUMENTS: dict[str, Any] = _FIXED["arguments"]
"""Arguments of the environments of all models, and the rows of observations of the largest."""

PARTS: dict[str, dict[str, list[int]]] = _FIXED["budgets_bytes"]
"""The models of each task, with their five budgets from the largest down; the last task alone has
models of the family GPT-NeoX. ``tools/unseen_budgets.py`` sets the budgets."""

SHAPE = 1, 64
"""Batch size and tokens of all requests."""

ORDER_LOSSES = (0.1, 0.2, 0.4, 0.8, 1.5)
"""What `cost_per_byte` loses at the budgets of a model, about, in nats per token."""

_BETWEEN = 4
"""Budgets of an episode between two of the five, and the lower one of them."""

_RESAMPLES = 10_000


def arguments_of(task: str) -> dict[str, Any]:
    """The arguments of a task's environment, `rap_env.envs.across.RAPAcrossEnv`."""
    workloads = {}
    for model, budgets in PARTS[task].items():
        places = np.arange(_BETWEEN * (len(budgets) - 1) + 1) / _BETWEEN
        between = np.interp(places, range(len(budgets)), budgets).round().astype(int).tolist()
        grid = {"batch_sizes": SHAPE[:1], "seq_lens_tokens": SHAPE[1:], "budget_bytes": between}
        workloads[model] = {"name": "grid", **grid}
    return {"models": list(workloads), "workloads": workloads, **ARGUMENTS}


@dataclass(frozen=True)
class ModelResult:
    """What a policy lost on one model.

    Attributes:
        model: Its name.
        delta_nll: Loss of each request on the split's text, cut, nats per token, (requests,).
        order_delta_nll: That of `cost_per_byte`.
    """

    model: str
    delta_nll: tuple[float, ...]
    order_delta_nll: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean loss over that of the order."""
        return float(np.mean(self.delta_nll) / np.mean(self.order_delta_nll))


@dataclass(frozen=True)
class UnseenEvaluation:
    """The result of `rap_env.evaluate` on a task across models.

    Attributes:
        name: The caller's name of the policy.
        task: The task.
        split: ``"calibration"`` or ``"test"``.
        runs: Plans of each request of which the best on the calibration text counts; 0 for one
            plan that is not run.
        models: The result of each model.
    """

    name: str
    task: str
    split: str
    runs: int
    models: tuple[ModelResult, ...]

    @property
    def score(self) -> float:
        """Geometric mean over models of their scores."""
        return float(np.exp(self._logs.mean()))

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval of the score: a bootstrap over models."""
        logs, rng = self._logs, np.random.default_rng(0)
        means = logs[rng.integers(len(logs), size=(_RESAMPLES, len(logs)))].mean(axis=1)
        low, high = np.exp(np.percentile(means, (2.5, 97.5)))
        return float(low), float(high)

    @property
    def _logs(self) -> Floats:
        return np.log([max(model.score, 1e-3) for model in self.models])

    def __str__(self) -> str:
        """The score with its interval, then that of each model."""
        low, high = self.interval
        lines = [
            f"{self.name} on {self.task}, {self.split} text, {self.runs} runs a request: "
            f"{self.score:.3f} [{low:.3f}, {high:.3f}] of the loss of the order by cost per byte"
        ]
        lines += [f"  {model.model:12} {model.score:.3f}" for model in self.models]
        return "\n".join(lines)


def evaluate_unseen(
    policy: Any, task: str, split: str, *, name: str, seed: int = 0, runs: int = 0
) -> UnseenEvaluation:
    """What `rap_env.evaluate` does on a task across models; see there."""
    import gymnasium

    whole_number("runs", runs, least=0)
    across: Any = gymnasium.make(task, disable_env_checker=True).unwrapped
    results = [
        _result(policy, across, model, sizes, split, seed, runs)
        for model, sizes in PARTS[task].items()
    ]
    return UnseenEvaluation(name, task, split, runs, tuple(results))


def _result(
    policy: Any, across: Any, model: str, budgets_bytes: list[int], split: str, seed: int, runs: int
) -> ModelResult:
    """What a policy loses on a model of an environment."""
    from rap_env.leaderboard.deciding import decider, made
    from rap_env.policies.base import Policy
    from rap_env.policies.loading import make_method
    from rap_env.policies.method import Basis
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import PlanScorer

    env = across.env_of(model)
    scorer, memory = env.context.scorer, env.memory
    requests = [Request(*SHAPE, size) for size in budgets_bytes]
    report = scorer
    if split == "test":
        text = CorpusConfig(**_FIXED["test_text"])
        report = PlanScorer(scorer.llm, load_corpus(text, scorer.llm))
    basis = Basis(env.context, env.encoder.ladder_bytes, seed)
    order, chooser = make_method("cost_per_byte", *basis), made(policy, basis)
    if hasattr(chooser, "max_evaluations"):
        chooser.max_evaluations = max(1, runs)
    decide = decider(chooser, across.padded)
    plays = range(1 if isinstance(chooser, Policy) else max(1, runs))
    most = ceiling_nll(memory.facts.vocab_size)

    def fits(plan: Plan, request: Request) -> bool:
        return bool(memory.peak_bytes(plan, request) <= request.budget_bytes)

    def best(request: Request) -> Plan:
        """The one of the plans that fits and that loses least on the calibration text."""
        tried = [decide(env, request, seed + number)[0] for number in plays]
        fitting = [plan for plan in tried if fits(plan, request)] or tried[:1]
        return min(fitting, key=scorer.nll) if len(fitting) > 1 else fitting[0]

    def losses(plans: Sequence[Plan]) -> tuple[float, ...]:
        delta_nll = np.array(report.nll_many(plans)) - report.native_nll
        fitting = [*map(fits, plans, requests)]
        return tuple(np.where(fitting, np.clip(delta_nll, 0, most), most).tolist())

    both = (losses([*map(choose, requests)]) for choose in (best, order.choose))
    return ModelResult(model, *both)
