"""Evaluate a policy on a pinned task, beside the published methods."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.artifacts import digest, disk_errors
from rap_env.context.base import PruningContext
from rap_env.errors import CorpusError, InvalidRequestError, check_name
from rap_env.leaderboard.deciding import decider, made
from rap_env.leaderboard.entries import Entry, Run, published_entries, table_values
from rap_env.leaderboard.measuring import Loss, TaskLosses
from rap_env.leaderboard.tasks import SPLITS, Floats, PinnedTask, pinned_task
from rap_env.leaderboard.unseen import PARTS, UnseenEvaluation, evaluate_unseen
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis
from rap_env.request import Request
from rap_env.reward import over_budget_nll
from rap_env.version import __version__

log = logging.getLogger(__name__)

_RESAMPLES = 10_000


@dataclass(frozen=True)
class CellResult:
    """What a policy chose for one request.

    Attributes:
        request: The request.
        plan: The plan.
        peak_bytes: Its peak bytes.
        budget_fraction: The budget as a share of the native model's peak bytes.
        loss: Its ΔNLL on the split's text, whether it fits or not.
        calibration: The same on the calibration text.
        evaluations: Plans that the policy scored for the request; 0 if it does not count them.
        decision_s: Seconds until the plan was known.
        truncated: Whether invalid actions ended the episode.
    """

    request: Request
    plan: Plan
    peak_bytes: int
    budget_fraction: float
    loss: Loss
    calibration: Loss
    evaluations: int
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
        setup_evaluations: Plans that the policy scored before the first request.
        entries: The published entries that were measured on the same text.
    """

    name: str
    task: PinnedTask
    split: str
    cells: tuple[CellResult, ...]
    seed: int
    text_sha256: str
    model_sha256: str
    setup_evaluations: int
    entries: tuple[Entry, ...]

    @property
    def scores(self) -> Floats:
        """What the plans count as at each request, nats per token: see `PinnedTask.scores`."""
        return self._counted([cell.loss.delta_nll for cell in self.cells])

    @property
    def mean_delta_nll(self) -> float:
        """Mean of `scores` over the requests, nats per token: the mean ΔNLL if all plans fit."""
        return float(self.scores.mean())

    @property
    def num_predicted(self) -> int:
        """How many of `scores` are predicted: plans over their budget count as a constant."""
        return sum(cell.loss.measured is None and cell.fits for cell in self.cells)

    @property
    def num_unknown(self) -> int:
        """Plans that fit and that the task's table has not measured."""
        return sum(cell.loss.predicted is not None and cell.fits for cell in self.cells)

    @property
    def predicted_delta_nll(self) -> float:
        """What `mean_delta_nll` is by the task's table alone, nats per token."""
        losses = [cell.loss for cell in self.cells]
        known = [x.delta_nll if x.predicted is None else x.predicted for x in losses]
        return float(self._counted(known).mean())

    def _counted(self, delta_nll: Sequence[float]) -> Floats:
        return self.task.scores(delta_nll, [cell.fits for cell in self.cells])

    @cached_property
    def digest(self) -> str:
        """Hash of the task and of the plans: what was evaluated, whatever its name."""
        plans = [json.loads(cell.plan.to_json()) for cell in self.cells]
        return digest([self.task.name, self.split, self.text_sha256, plans])

    def against(self, entry: Entry) -> tuple[float, float, float]:
        """Mean ΔNLL minus that of an entry, with a paired 95 % interval over the requests.

        Negative values: this policy loses less. The interval is a bootstrap over shapes of
        requests, because the plans for one shape are alike; requests are the same for both.
        """
        difference, numbers = self.scores - entry.scores(self.split), dict[Any, int]()
        requests = [(c.request.batch_size, c.request.seq_len_tokens) for c in self.cells]
        shapes = [numbers.setdefault(shape, len(numbers)) for shape in requests]
        sums, counts = np.bincount(shapes, difference), np.bincount(shapes)
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(sums), size=(_RESAMPLES, len(sums)))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(difference.mean()), float(low), float(high)

    def __str__(self) -> str:
        """A text table, from the least measured mean ΔNLL up; a predicted one is not ranked."""
        own, ranked = f"{self.name} (this)", not self.num_predicted
        as_new = {}
        if self.entries and self.split == "test" and self.num_unknown:
            by_table = table_values(self.task.comparison)
            as_new = {name: values.test for name, values in by_table.items()}
        column = "  predicted" if self.num_unknown else ""
        predicted = f"{self.predicted_delta_nll:.4f}"
        rows = [(self.mean_delta_nll if ranked else math.inf, own, predicted, "")]
        for entry in self.entries:
            mean, low, high = self.against(entry)
            predicted = f"{as_new[entry.name]:.4f}" if entry.name in as_new else ""
            against = f"  {mean:+.4f} [{low:+.4f}, {high:+.4f}]" if ranked else ""
            rows.append((float(entry.scores(self.split).mean()), entry.name, predicted, against))
        rows.sort(key=lambda row: row[0])
        width = max(len(name) for _, name, *_ in rows)
        versus = f"  {own} minus it [95 % interval over shapes]" if ranked else ""
        lines = [
            f"{self.task.name}, {self.split} text, {len(self.cells)} requests: mean ΔNLL in nats "
            "per token (less is better)",
            f"{'':{width}}  {'ΔNLL':>8}{column}{versus}",
        ]
        for mean, name, predicted, against in rows:
            value = f"{mean:8.4f}" if math.isfinite(mean) else f"{'-':>8}"
            shown = f"{predicted:>{len(column)}}" if column else ""
            lines.append(f"{name:{width}}  {value}{shown}{against}".rstrip())
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
                "table has not measured these plans.\nIt is not ranked until the model has run "
                "them: evaluate(..., measure=True)."
            )
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """The results as records in the format of `experiments.compare`."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: CellResult) -> dict[str, Any]:
        plan, request, delta_nll = cell.plan, cell.request, cell.loss.delta_nll
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
            "seed": None,
            "request": {"batch_size": request.batch_size, "seq_len_tokens": request.seq_len_tokens},
            "budget_fraction": cell.budget_fraction,
            "budget_bytes": request.budget_bytes,
            "peak_bytes": cell.peak_bytes,
            "fits": cell.fits,
            "calibration_delta_nll": cell.calibration.delta_nll,
            **dict.fromkeys(("delta_nll", "delta_nll_ci_low", "delta_nll_ci_high"), delta_nll),
            "window_delta_nll": [delta_nll],
            "accuracies": {},
            "decision_s": cell.decision_s,
            "evaluations": cell.evaluations,
            "setup_evaluations": self.setup_evaluations,
            "provenance": {"depends_on": depends_on, "predicted": cell.loss.measured is None},
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
        """The plans as an entry, with their ΔNLL on each text on which all that fit are measured.

        Args:
            description: One sentence: what the method is.
            **origin: Who made it and how, such as ``url="https://..."``.
        """
        fits = tuple(cell.fits for cell in self.cells)
        losses = {
            "calibration": [cell.calibration for cell in self.cells],
            self.split: [cell.loss for cell in self.cells],
        }
        delta_nll = {
            split: tuple(loss.delta_nll for loss in of)
            for split, of in losses.items()
            if all(loss.measured is not None for loss in itertools.compress(of, fits))
        }
        plans = tuple(cell.plan.levels for cell in self.cells)
        run = Run(seed=None, plans=plans, delta_nll=delta_nll, fits=fits)
        return Entry(
            name=self.name,
            comparison=self.task.comparison,
            description=description,
            runs=(run,),
            evaluations=float(np.median([cell.evaluations for cell in self.cells])),
            setup_evaluations=self.setup_evaluations,
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
    measure: bool = False,
    runs: int | None = None,
) -> Evaluation | UnseenEvaluation:
    """Evaluate a policy at the requests of a pinned task, or on the models of a task across models.

    Args:
        policy: What decides: an object with ``choose(request)`` that returns a plan; the name
            or class of a method (`rap_env.policies.method.Method`), which is made on the
            task's scores; a stable-baselines3 model (``predict``; it gets the action mask if it
            takes one, and acts deterministically); or a function from an observation to an
            action.
        task: Name of a pinned task, such as ``"RAPLadder/SmolLM2-Table-v1"``.
        split: ``"calibration"``, the text that the rewards of the task come from, or
            ``"test"``, text that no published method has used.
        name: The name of the policy in the result.
        seed: Seed of the episodes, for policies that draw, and of a method.
        runs: For a task across models, such as ``"RAPLadder/Unseen-Test-v1"``: plans of each
            request that are run on the calibration text, of which the best counts. A function or
            an agent plays the request so often, an agent after the first time with random
            actions; a method gets it as `max_evaluations`, if it has that. 0 or None is one plan
            that is not run.
        measure: Whether to run the model for the plans within their budget that the task's
            table has not measured, on the split's text and on the calibration text (if this
            machine can make it again). That takes seconds to a minute a plan, and goes on where
            it was if it is started again. Later evaluations use the values; the table stays as
            it is.

    Returns:
        The plans, what they lose, and the published methods on the same requests and text; for a
        task across models a score relative to the order by cost per byte.

    Raises:
        UnknownNameError: There is no such task, split or method.
        InvalidRequestError: `runs` is below 0, or given for a task of one model.
        InvalidRequestError: The policy has none of these forms, or what it chooses is no plan.
        ArtifactError: The task's table has no losses on held-out text, or the model that
            `measure` loads is another one than the table's.
        RapError: As the environment does.
    """
    check_name("split", split, SPLITS)
    if task in PARTS:
        return evaluate_unseen(policy, task, split, name=name, seed=seed, runs=runs or 0)
    pinned = pinned_task(task)
    if runs is not None:
        raise InvalidRequestError(f"runs is for tasks across models ({', '.join(PARTS)}).")
    env: Any = pinned.make()
    context: PruningContext = env.unwrapped.context
    basis = Basis(context, env.unwrapped.encoder.ladder_bytes, seed, pinned.arguments["workload"])
    policy = made(policy, basis)
    published = published_entries(pinned.comparison)
    losses = TaskLosses(pinned, context, published)
    text_sha256 = losses.text_sha256(split)
    cells = _cells(policy, env, losses, split, seed)
    env.close()
    if measure:
        plans = [cell.plan for cell in cells if cell.fits]
        losses.measure(plans, split)
        try:
            losses.measure(plans, "calibration")
        except CorpusError as error:  # text that a model wrote differs between machines
            log.warning("Values on the calibration text stay predicted. %s", error)
        cells = [replace(cell, **_known(losses, cell.plan, split)) for cell in cells]
    entries = [entry for entry in published if entry.measured_on(split)]
    return Evaluation(
        name=name,
        task=pinned,
        split=split,
        cells=tuple(cells),
        seed=seed,
        text_sha256=text_sha256,
        model_sha256=context.memory.facts.fingerprint,
        setup_evaluations=_scored(policy)[1],
        entries=tuple(entries) if text_sha256 == pinned.sha256_of(split) else (),
    )


def _cells(policy: Any, env: Any, losses: TaskLosses, split: str, seed: int) -> list[CellResult]:
    """What a policy decides at each request of a task, and what is known of its plans' losses."""
    memory, decide, cells = env.unwrapped.memory, decider(policy), []
    for number, request in enumerate(losses.task.requests):
        scored, began = _scored(policy)[0], time.perf_counter()
        plan, truncated = decide(env, request, seed + number)
        decision_s = time.perf_counter() - began
        native_bytes = memory.native_peak_bytes(request.batch_size, request.seq_len_tokens)
        cell = CellResult(
            request=request,
            plan=plan,
            peak_bytes=memory.peak_bytes(plan, request),
            budget_fraction=request.budget_bytes / native_bytes,
            **_known(losses, plan, split),
            evaluations=_scored(policy)[0] - scored,
            decision_s=decision_s,
            truncated=truncated,
        )
        cells.append(cell)
    return cells


def _known(losses: TaskLosses, plan: Plan, split: str) -> dict[str, Any]:
    """What is known so far of a plan's losses: the fields of a `CellResult`."""
    return {"loss": losses.of(plan, split), "calibration": losses.of(plan, "calibration")}


def _scored(policy: Any) -> tuple[int, int]:
    """Plans that a policy has scored so far: for requests, and before the first one."""
    if isinstance(policy, Policy):
        return policy.evaluations, policy.setup_evaluations
    return 0, 0
