"""Evaluate a policy on a pinned task, beside the published methods."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rap_env.artifacts import digest, disk_errors
from rap_env.context.base import PruningContext
from rap_env.context.table import TableContext
from rap_env.errors import ArtifactError, InvalidRequestError, check_name
from rap_env.leaderboard.entries import Entry, Run, predicted_test_delta_nll, published_entries
from rap_env.leaderboard.tasks import SPLITS, Floats, PinnedTask, pinned_task
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.reward import over_budget_nll
from rap_env.scoring.corpus import CorpusConfig
from rap_env.version import __version__

Decision = tuple[Plan, bool]
"""A plan, and whether invalid actions ended the episode before it fitted."""

_RESAMPLES = 10_000


@runtime_checkable
class _Chooser(Protocol):
    """What chooses a plan for a request, such as a `rap_env.policies.base.Policy`."""

    def choose(self, request: Request) -> Any: ...


@runtime_checkable
class _Predictor(Protocol):
    """A model of stable-baselines3."""

    predict: Callable[..., Any]


@dataclass(frozen=True)
class CellResult:
    """What a policy chose for one request.

    Attributes:
        request: The request.
        plan: The plan.
        peak_bytes: Its peak bytes.
        budget_fraction: The budget as a share of the native model's peak bytes.
        delta_nll: Its ΔNLL on the split's text, nats per token, whether it fits or not.
        calibration_delta_nll: The same on the calibration text.
        predicted: Whether ΔNLL was predicted, because the table has not measured the plan.
        decision_s: Seconds until the plan was known.
        truncated: Whether invalid actions ended the episode.
    """

    request: Request
    plan: Plan
    peak_bytes: int
    budget_fraction: float
    delta_nll: float
    calibration_delta_nll: float
    predicted: bool
    decision_s: float
    truncated: bool

    @property
    def fits(self) -> bool:
        """Whether the plan is within the budget."""
        return self.peak_bytes <= self.request.budget_bytes


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`; ``print`` shows it beside the published methods.

    Attributes:
        name: The caller's name of the policy.
        task: The pinned task.
        split: ``"calibration"`` or ``"test"``.
        cells: A result for each request.
        seed: The seed of the episodes.
        text_sha256: Hash of the tokens that ΔNLL is of.
        model_sha256: Fingerprint of the weights.
        entries: The published entries that were measured on the same text.
    """

    name: str
    task: PinnedTask
    split: str
    cells: tuple[CellResult, ...]
    seed: int
    text_sha256: str
    model_sha256: str
    entries: tuple[Entry, ...]

    @property
    def scores(self) -> Floats:
        """What the plans count as at each request, nats per token: see `PinnedTask.scores`."""
        cells = self.cells
        return self.task.scores([cell.delta_nll for cell in cells], [cell.fits for cell in cells])

    @property
    def mean_delta_nll(self) -> float:
        """Mean of `scores` over the requests, nats per token: the mean ΔNLL if all plans fit."""
        return float(self.scores.mean())

    @property
    def num_predicted(self) -> int:
        """How many of `scores` are predicted: plans over their budget count as a constant."""
        return sum(cell.predicted and cell.fits for cell in self.cells)

    @cached_property
    def digest(self) -> str:
        """Hash of the task and of the plans: what was evaluated, whatever its name."""
        plans = [json.loads(cell.plan.to_json()) for cell in self.cells]
        return digest([self.task.name, self.split, self.text_sha256, plans])

    def against(self, entry: Entry) -> tuple[float, float, float]:
        """Mean ΔNLL minus that of an entry, with a paired 95 % interval over the requests.

        Negative values: this policy loses less. The interval is a bootstrap over requests,
        which are the same for both.
        """
        difference = self.scores - entry.scores(self.split)
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(difference), size=(_RESAMPLES, len(difference)))
        low, high = np.percentile(difference[drawn].mean(axis=1), (2.5, 97.5))
        return float(difference.mean()), float(low), float(high)

    def __str__(self) -> str:
        """A text table, from the least mean ΔNLL up."""
        own = f"{self.name} (this)"
        has_predictions = self.split == "test" and self.num_predicted
        as_new = predicted_test_delta_nll(self.task.comparison) if has_predictions else {}
        column = "  predicted" if as_new else ""
        rows = [(self.mean_delta_nll, own, "")]
        for entry in self.entries:
            mean, low, high = self.against(entry)
            predicted = f"{as_new[entry.name]:.4f}" if entry.name in as_new else ""
            against = f"{predicted:>{len(column)}}  {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            rows.append((float(entry.scores(self.split).mean()), entry.name, against))
        rows.sort(key=lambda row: row[0])
        width = max(len(name) for _, name, _ in rows)
        lines = [
            f"{self.task.name}, {self.split} text, {len(self.cells)} requests: mean ΔNLL in nats "
            "per token (less is better)",
            f"{'':{width}}  {'ΔNLL':>8}{column}  {own} minus it [95 % interval over requests]",
            *(f"{name:{width}}  {mean:8.4f}{against}" for mean, name, against in rows),
        ]
        if missed := sum(not cell.fits for cell in self.cells):
            ceiling = self.task.ceiling_nll
            lines.append(
                f"{missed} plans exceed their budget and count as {over_budget_nll(ceiling):.1f}; "
                f"a plan that fits counts as at most {ceiling:.1f}."
            )
        if truncated := sum(cell.truncated for cell in self.cells):
            hint = "does the policy use observation['action_mask']?"
            lines.append(f"{truncated} episodes ended by invalid actions; {hint}")
        if self.num_predicted:
            lines.append(
                f"{self.num_predicted} of {len(self.cells)} values of {own} are predicted: the "
                "table has not measured these plans.\nIntervals leave out the error of prediction"
                + ("; 'predicted' counts the others as unmeasured." if as_new else ".")
            )
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """The results as records in the format of `experiments.compare`."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: CellResult) -> dict[str, Any]:
        plan, request = cell.plan, cell.request
        depends_on = {
            "task": self.task.name,
            "split": self.split,
            "model_fingerprint": self.model_sha256,
            "report_sha256": self.text_sha256,
            "calibration_sha256": self.task.calibration_sha256,
            "seed": self.seed,
            "evaluated": self.digest,
            "rap_env": __version__,
        }
        return {
            "method": self.name,
            "kv_aware": True,
            "seed": None,
            "request": {"batch_size": request.batch_size, "seq_len_tokens": request.seq_len_tokens},
            "budget_fraction": cell.budget_fraction,
            "budget_bytes": request.budget_bytes,
            "peak_bytes": cell.peak_bytes,
            "fits": cell.fits,
            "attn_removed": plan.count_removed("attn"),
            "ffn_removed": plan.count_removed("ffn"),
            "mask": list(plan.removed_names),
            "calibration_delta_nll": cell.calibration_delta_nll,
            "delta_nll": cell.delta_nll,
            "delta_nll_ci_low": cell.delta_nll,
            "delta_nll_ci_high": cell.delta_nll,
            "window_delta_nll": [cell.delta_nll],
            "accuracies": {},
            "decision_s": cell.decision_s,
            "evaluations": 0,
            "setup_evaluations": 0,
            "provenance": {"depends_on": depends_on, "predicted": cell.predicted},
            "levels": plan.levels,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Append the results to a JSON-lines file, one line for each request; return its path.

        Raises:
            StorageFullError: The disk is full.
        """
        path = Path(path)
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows())
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        return path

    def entry(self, description: str, **origin: Any) -> Entry:
        """The plans as an entry for the leaderboard.

        Args:
            description: One sentence: what the method is.
            **origin: Who made it and how, such as ``url="https://..."``.
        """
        run = Run(
            seed=None,
            plans=tuple(cell.plan.levels for cell in self.cells),
            delta_nll={self.split: tuple(cell.delta_nll for cell in self.cells)},
            fits=tuple(cell.fits for cell in self.cells),
        )
        return Entry(
            name=self.name,
            comparison=self.task.comparison,
            description=description,
            runs=(run,),
            decision_s=float(np.median([cell.decision_s for cell in self.cells])),
            origin=origin,
        )


def evaluate(
    policy: Any,
    task: str,
    split: str = "calibration",
    *,
    name: str,
    seed: int = 0,
    text: CorpusConfig | None = None,
) -> Evaluation:
    """Evaluate a policy at the requests of a pinned task.

    Args:
        policy: What decides: an object with ``choose(request)`` that returns a plan; a
            stable-baselines3 model (``predict``; it gets the action mask if it takes one, and
            acts deterministically); or a function from an observation to an action.
        task: Name of a pinned task, such as ``"RAPLadder/SmolLM2-Table-v1"``.
        split: ``"calibration"``, the text that the rewards of the task come from, or
            ``"test"``, text that no published method has used.
        name: The name of the policy in the result.
        seed: Seed of the episodes, for policies that draw.
        text: The text of ``split="test"`` for a task with a live model; the published methods
            are shown beside it only if it has the tokens of their test text.

    Returns:
        The plans, what they lose, and the published methods on the same requests and text.

    Raises:
        UnknownNameError: There is no such task or split.
        InvalidRequestError: The policy has none of the three forms, what it chooses is no
            plan, or the live task needs a text.
        ArtifactError: The task's table has no losses on held-out text.
        RapError: As the environment does.
    """
    pinned = pinned_task(task)
    check_name("split", split, SPLITS)
    decide = _decider(policy)
    env: Any = pinned.make()
    context: PruningContext = env.unwrapped.context
    text_sha256, judge = _judge(pinned, context, split, text)
    cells = []
    for number, request in enumerate(pinned.requests):
        began = time.perf_counter()
        decision = decide(env, request, seed + number)
        decision_s = time.perf_counter() - began
        cells.append(_cell(context, judge, request, decision, decision_s))
    env.close()
    entries = [e for e in published_entries(pinned.comparison) if e.measured_on(split)]
    return Evaluation(
        name=name,
        task=pinned,
        split=split,
        cells=tuple(cells),
        seed=seed,
        text_sha256=text_sha256,
        model_sha256=context.memory.facts.fingerprint,
        entries=tuple(entries) if text_sha256 == pinned.sha256_of(split) else (),
    )


def _cell(
    context: PruningContext, judge: Judge, request: Request, decision: Decision, decision_s: float
) -> CellResult:
    """The result of one request."""
    plan, truncated = decision
    memory, scorer = context.memory, context.scorer
    peak_bytes = memory.peak_bytes(plan, request)
    calibration = scorer.nll(plan) - scorer.dense_nll
    delta_nll, predicted = judge(plan, calibration)
    return CellResult(
        request=request,
        plan=plan,
        peak_bytes=peak_bytes,
        budget_fraction=request.budget_bytes
        / memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens),
        delta_nll=delta_nll,
        calibration_delta_nll=calibration,
        predicted=predicted,
        decision_s=decision_s,
        truncated=truncated,
    )


def _decider(policy: Any) -> Callable[[Any, Request, int], Decision]:
    """What gives the decision of a policy for a request in an environment, with a seed."""
    if isinstance(policy, _Chooser):

        def chosen(_env: Any, request: Request, _seed: int) -> Decision:
            plan = policy.choose(request)
            if not isinstance(plan, Plan):
                raise InvalidRequestError(
                    "choose(request) must return a rap_env.Plan, such as "
                    f"Plan.of({{'layer03.ffn': 'removed'}}), not {plan!r}."
                )
            return plan, False

        return chosen
    act = policy
    if isinstance(policy, _Predictor):
        masked = "action_masks" in inspect.signature(policy.predict).parameters

        def act(observation: Mapping[str, Any]) -> Any:
            masks = {"action_masks": observation["action_mask"].astype(bool)} if masked else {}
            return policy.predict(observation, deterministic=True, **masks)[0]

    elif not callable(policy):
        raise InvalidRequestError(
            "A policy is an object with choose(request), a stable-baselines3 model, or a function "
            f"from an observation to an action, not {policy!r}."
        )

    def played(env: Any, request: Request, seed: int) -> Decision:
        observation, _ = env.reset(seed=seed, options={"request": request})
        terminated = truncated = False
        while not (terminated or truncated):
            observation, _, terminated, truncated, _ = env.step(act(observation))
        return env.unwrapped.plan, truncated  # tasks limit no steps

    return played


Judge = Callable[[Plan, float], tuple[float, bool]]
"""Takes a plan and its ΔNLL on the calibration text; returns that on the split's text, and
whether it is predicted."""


def _judge(
    task: PinnedTask, context: PruningContext, split: str, text: CorpusConfig | None
) -> tuple[str, Judge]:
    """The hash of the tokens of a split's text, and what measures ΔNLL on it."""
    if text is not None and (split != "test" or not task.live):
        raise InvalidRequestError(
            f"text is for split='test' of a task with a live model; {task.name} with "
            f"split={split!r} has its own."
        )
    table = context.table if isinstance(context, TableContext) else None
    if split == "calibration":
        sha256 = context.corpus.sha256 if table is None else str(table.text["sha256"])
        return sha256, lambda plan, value: (value, context.scorer.is_predicted(plan))
    if table is not None:
        held_out = table.held_out
        if held_out is None:
            raise ArtifactError(
                f"The table of {task.name} has no losses on held-out text; use split='calibration'."
            )
        return held_out.text["sha256"], lambda plan, value: (
            held_out.delta_nll(plan, value),
            held_out.is_predicted(plan),
        )
    if text is None:
        raise InvalidRequestError(
            f"{task.name} runs the model, so split='test' needs a text. Published results are on "
            f"{dict(task.test_text)}; pass text=CorpusConfig(..., role='report')."
        )
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import PlanScorer

    corpus = load_corpus(text, context.llm)
    live = PlanScorer(context.llm, corpus, context.store)
    return corpus.sha256, lambda plan, _: (live.nll(plan) - live.dense_nll, False)
