"""``python -m experiments.tight_grid``: pin budgets at which uniform settings lose given amounts.

Budgets as shares of a model's memory are easy for one request and impossible for another.
Here a budget is what a uniform setting (`rap_env.policies.uniform`) needs that loses about
0.05, 0.1 ... nats per token on the calibration text. Of the settings that fit, it is the one
whose parts lose least, added up. It fits its budget exactly, so it wastes no byte. The
budgets are written once, in bytes, for ``evaluate.pinned``.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from experiments.config import Config
from experiments.config.common import Pinned, parse_shape
from experiments.contexts import build_context, make_ladder_bytes
from experiments.launch import launch
from experiments.study.console import ExperimentError, say
from experiments.study.json_records import write_text
from experiments.study.run_folder import RunFolder
from rap_env.errors import counted
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.method import Basis
from rap_env.policies.uniform import Uniform
from rap_env.request import Request

HEADER = """\
# @package _global_
# Budgets in bytes at which a good uniform setting loses about the ΔNLL behind ~ (nats per token, on
# the calibration text). Written by
#   python -m experiments.tight_grid experiment={name}
# Model {model} ({dtype}, weights {weights}); calibration text {text}.
# Behind each budget: what the setting loses there, and the setting.
evaluate:
  pinned:
"""

_NEIGHBOURS = 3  # budgets whose losses are compared with the wanted one
_LEAST_DELTA_NLL = 1e-6  # noise may make a lowered level better than the native one


@dataclass(frozen=True)
class TightBudget:
    """A budget that a uniform setting needs.

    Attributes:
        pinned: The request, the budget and the ΔNLL that was asked for.
        delta_nll: ΔNLL of the setting on the calibration text, nats per token.
        plan: The setting.
    """

    pinned: Pinned
    delta_nll: float
    plan: Plan

    @property
    def line(self) -> str:
        """The budget as an entry of ``evaluate.pinned``, with a comment."""
        weights = next((level for _, level in self.plan.weights), "native")
        caches = next((level.name for _, level in self.plan.caches), "native")
        setting = (
            f"weights {weights}, caches {caches}, embeddings {self.plan.embeddings}, "
            f"{counted(len(self.plan.removed), 'block')} removed"
        )
        return f"    - {self.pinned}   # {self.delta_nll:.4f}: {setting}"


def tight_grid(config: Config, folder: Path) -> Path:
    """Find the budgets and write them as a fragment of settings.

    Returns:
        The path of the fragment.

    Raises:
        ExperimentError: A request has too few uniform settings.
    """
    settings, run, started = config.tight_grid, RunFolder(folder), time.monotonic()
    run.start(config)
    context = build_context(config)
    ladder_bytes = make_ladder_bytes(config, context)
    baseline, budgets = Uniform(Basis(context, ladder_bytes)), []
    shapes = [parse_shape(text) for text in settings.requests]
    for shape in progress_bar(config.progress, shapes, desc="tight grid", unit="request"):
        budgets += tight_budgets(baseline, shape, settings.losses)
    facts, text = context.memory.facts, context.corpus.provenance
    head = HEADER.format(
        name=config.name,
        model=config.model.name,
        dtype=facts.dtype,
        weights=config.model.weights,
        text=f"{text['source']}, {text['windows']} x {text['window_tokens']} tokens, "
        f"seed {text['seed']}, SHA-256 {context.corpus.sha256[:12]}",
    )
    path = Path(settings.out)
    write_text(path, head + "\n".join(budget.line for budget in budgets) + "\n")
    run.finish(
        started, evaluations=context.scorer.known, evaluations_run=context.scorer.evaluations
    )
    say(f"{len(budgets)} budgets are in {path}.")
    return path


def tight_budgets(
    baseline: Uniform, shape: tuple[int, int], losses: Sequence[float]
) -> list[TightBudget]:
    """Return a budget for each loss, from loose to tight.

    Args:
        baseline: Chooses a uniform setting for a request.
        shape: Batch size and sequence length in tokens.
        losses: ΔNLL that the setting shall have, nats per token.

    Raises:
        ExperimentError: There are too few settings for different budgets.
    """
    sizes, scorer = baseline.all_peak_bytes(shape), baseline.context.scorer

    @cache
    def at(number: int) -> TightBudget:
        request = Request(*shape, budget_bytes=sizes[number])
        plan = baseline.settings(request)[0].plan
        delta_nll = scorer.nll(plan) - scorer.native_nll
        pinned = Pinned(shape, baseline.memory.peak_bytes(plan, request))
        return TightBudget(pinned, delta_nll, plan)

    def delta_nll(number: int) -> float:
        return max(at(number).delta_nll, _LEAST_DELTA_NLL)

    budgets: list[TightBudget] = []
    for loss in sorted(losses):
        first = bisect.bisect_left(range(len(sizes)), loss, key=delta_nll)
        last = budgets[-1].pinned.budget_bytes if budgets else math.inf
        candidates = range(max(0, first - 1), len(sizes))
        smaller = (number for number in candidates if at(number).pinned.budget_bytes < last)
        nearest = min(
            itertools.islice(smaller, _NEIGHBOURS),
            key=lambda number: abs(math.log(delta_nll(number) / loss)),
            default=None,
        )
        if nearest is None:
            raise ExperimentError(
                f"Uniform settings for {shape[0]} x {shape[1]} tokens are too few for a budget of "
                f"its own at a loss of {loss:g}; give fewer losses in tight_grid.losses."
            )
        setting = at(nearest)
        pinned = replace(setting.pinned, target_delta_nll=loss)
        budgets.append(replace(setting, pinned=pinned))
    return budgets


if __name__ == "__main__":
    launch("tight_grid", tight_grid)
