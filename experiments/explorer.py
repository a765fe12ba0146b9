"""``python -m experiments.explorer``: make the page that shows each method's plan for a request.

The plans are computed at a grid of requests from the score table and the byte arithmetic in the
package, in about five minutes, and embedded in one HTML file that needs no network. It is
committed, so that documentation and reports copy it; no model is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study.looks import LEVEL_COLOURS, look
from rap_env.artifacts import atomic_write, canonical_json
from rap_env.blocks import block_name
from rap_env.context.table import TableContext
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import GSIProfile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.policies.packaged_files import default_facts, packaged_context
from rap_env.request import Request
from rap_env.scoring.held_out import HeldOutLosses

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = TEMPLATE.parents[1] / "docs" / "_static" / "explorer.html"
"""The committed page."""

METHODS = {
    "rap": "a trained network, no run of the model",
    "frontier": "the best of the measured plans that fits",
    "score_model": "a search on predicted losses",
    "knapsack": "as if the costs of items added up",
    "uniform": "one level for all, then blocks go",
    "one_shot": "the least important item first",
}
"""The methods of the page, with what they do in a few words."""

BATCHES, LENGTHS = (1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048, 4096, 8192)

_DEEPEST_DELTA_NLL = 2.0  # of the smallest budget, nats per token
_TIGHT_BUDGETS, _LOOSE_BUDGETS = 16, 9  # below and above the bytes of all items at lowest levels
_BEGIN, _END = '<script type="application/json" id="data">', "</script>"


class ExplorerContext(TableContext):
    """The packaged scores, with what lookups and uniform settings need from the measured plans."""

    @cached_property
    def frontier(self) -> PlanTable:
        """All plans that the score table measured."""
        return PlanTable(
            num_layers=self.table.facts.num_layers,
            dense_nll=self.table.dense_nll,
            scores=self.table.scores,
            evaluations_run=0,
            seconds=0.0,
            settings={},
            provenance=self.table.context,
        )

    def item_gsi(self, item_bytes: LadderBytes) -> GSIProfile:  # type: ignore[override]
        """The order of removals along the measured masks, the best next one first."""
        scores, blocks, mask = self.table.scores, set(range(self.table.facts.num_blocks)), Plan()
        order, nll_after = [], []
        while nexts := {
            block: scores[plan]
            for block in blocks - mask.removed
            if (plan := mask.without(block)) in scores
        }:
            block = min(nexts, key=nexts.__getitem__)
            mask = mask.without(block)
            order.append(block_name(block))
            nll_after.append(nexts[block])
        one_shot = map(float, self.one_shot.delta_nll)
        rises = dict(zip(map(block_name, sorted(blocks)), one_shot, strict=True))
        return GSIProfile(
            evaluations=0,
            evaluations_run=0,
            block_forwards=0.0,
            seconds=0.0,
            provenance=dict(self.table.context),
            method="lazy",
            levels={item.name: list(item.levels) for item in item_bytes.ladder.items},
            together=(),
            dense_nll=self.table.dense_nll,
            order=tuple(order),
            nll_after=tuple(nll_after),
            first_nll={},
            last_rises=rises,
            candidates=(),
        )


def explorer_data(
    batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    """The plans of all methods at each batch size, length and budget, with their bytes and ΔNLL.

    Returns:
        JSON values. ``choices`` has, by method, shape (batch, then length) and budget, the number
        of a plan, the bytes of its caches and those of the rest; ``plans`` has, by number, its
        levels (a digit for each item: attention, caches, FFN by layer, then embeddings), the bytes
        of its weights and embeddings, its ΔNLL on held-out text, and whether that was measured.
    """
    packaged = packaged_context(MemoryModel(default_facts()))
    assert isinstance(packaged, TableContext)
    context = ExplorerContext(packaged.table, packaged.name, importance="one_shot")
    memory, item_bytes = (
        context.memory,
        LadderBytes(context.memory, Ladder.of(context.memory.facts)),
    )
    policies = [make_method(name, context, item_bytes) for name in METHODS]
    shapes = [(batch, length) for batch in batches for length in lengths]
    plans: dict[Plan, int] = {}
    budgets, natives, choices = [], [], [[] for _ in METHODS]  # type: ignore[var-annotated]
    for shape in progress_bar(True, shapes, desc="plans", unit="request"):
        budgets.append(_budgets(context, item_bytes, shape))
        natives.append(memory.dense_peak_bytes(*shape))
        for policy, rows in zip(policies, choices, strict=True):
            rows.append([])
            for budget in budgets[-1]:
                request = Request(*shape, budget_bytes=budget)
                plan = policy.choose(request)
                parts = memory.breakdown(plan, request)
                number = plans.setdefault(plan, len(plans))
                rows[-1].append([number, parts.kv_cache, parts.workspace])
    return {
        "measured": len(context.table.scores),
        "tokens": _held_out(context).text["window_tokens"],
        "error": _held_out(context).fidelity.rows[0].median_relative_error,
        "batches": batches,
        "lengths": lengths,
        "budgets": budgets,
        "natives": natives,
        "tight": _TIGHT_BUDGETS - 1,
        "levels": [[name, LEVEL_COLOURS[name]] for name in _levels(item_bytes.ladder)],
        "methods": [[look(name).label, look(name).colour, what] for name, what in METHODS.items()],
        "choices": choices,
        "plans": [_plan_row(context, item_bytes.ladder, plan) for plan in plans],
    }


def _budgets(
    context: ExplorerContext, item_bytes: LadderBytes, shape: tuple[int, int]
) -> list[int]:
    """Budgets for a request, in bytes: from one that costs 2 nats to the native peak.

    The last of the tight ones is the least at which no block has to be removed.
    """
    known = context.frontier.on(item_bytes.ladder)
    peaks = known.peak_bytes(item_bytes.costs(*shape))
    kept = [not plan.removed for plan in known.plans]
    least, lowest = peaks[known.delta_nll < _DEEPEST_DELTA_NLL].min(), peaks[kept].min()
    tight = np.linspace(least, lowest, _TIGHT_BUDGETS)
    native = context.memory.dense_peak_bytes(*shape)
    loose = np.geomspace(lowest, native, _LOOSE_BUDGETS + 1)[1:-1]
    return [*map(int, tight), *map(int, loose), native]


def _levels(ladder: Ladder) -> list[str]:
    """All levels of the ladder, from native to removed."""
    names = {name for item in ladder.items for name in item.levels}
    return [name for name in LEVEL_COLOURS if name in names]


def _plan_row(context: ExplorerContext, ladder: Ladder, plan: Plan) -> list[Any]:
    """What the page knows of a plan, whatever the request."""
    names, facts = _levels(ladder), context.memory.facts
    layers = range(facts.num_layers)
    caches = ("removed" if 2 * n in plan.removed else plan.cache_level(n).name for n in layers)
    levels = [
        *(plan.weight_level(2 * layer) for layer in layers),
        *caches,
        *(plan.weight_level(2 * layer + 1) for layer in layers),
        plan.embeddings,
    ]
    held_out = _held_out(context)
    delta_nll = held_out.delta_nll(plan, context.scorer.nll(plan) - context.scorer.dense_nll)
    parts = context.memory.breakdown(plan, Request(1, 1, budget_bytes=1))
    digits = "".join(str(names.index(level)) for level in levels)
    measured = int(not held_out.is_predicted(plan))
    return [digits, parts.weights, parts.embeddings, round(delta_nll, 3), measured]


def _held_out(context: ExplorerContext) -> HeldOutLosses:
    assert context.table.held_out is not None  # the packaged table has losses on held-out text
    return context.table.held_out


def read_data(page: Path = PAGE) -> dict[str, Any]:
    """The values of `explorer_data` that a page holds."""
    data: dict[str, Any] = json.loads(
        page.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    )
    return data


def write_explorer(page: Path, data: dict[str, Any] | None = None) -> Path:
    """Write the page from `explorer_data`, by default that of the committed page.

    Raises:
        StorageFullError: The disk is full.
    """
    embedded = f"{_BEGIN}{canonical_json(read_data() if data is None else data)}{_END}"
    with atomic_write(page) as file:
        template = TEMPLATE.read_text(encoding="utf-8")
        file.write(template.replace("<!-- data -->", embedded).encode())
    return page


if __name__ == "__main__":
    print(write_explorer(PAGE, explorer_data()))
