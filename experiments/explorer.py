"""``python -m experiments.explorer``: make the page that shows each method's plan for a request.

The plans are computed at a grid of requests from the score table and the byte arithmetic in
the package, in about two minutes, and embedded in one HTML file that needs no network. It is
committed, so that documentation and reports copy it; no model is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from experiments.study.json_records import write_text
from experiments.study.plotting import LEVEL_COLOURS, item_levels, look
from rap_env.artifacts import canonical_json
from rap_env.context.table import TableContext
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import make_method
from rap_env.request import Request
from rap_env.scoring.score_table import ScoreTable, table_path

PAGE = Path(__file__).parents[1] / "docs" / "_static" / "explorer.html"
"""The committed page, in which this program replaces the data."""

TABLE = "score_table:smollm2-135m-low-bits"
"""The packaged table, with levels of weights down to two bits."""

METHODS = {
    "rap-low-bits": "a trained network, no run of the model",
    "frontier": "the best of the measured plans that fits",
    "score_model": "a search on predicted losses",
    "knapsack": "as if the costs of items added up",
    "uniform": "one level for all, then blocks go",
    "one_shot": "the least important item first",
}
"""The methods of the page, with what they do in a few words."""

BATCHES, LENGTHS = (1, 4, 8, 16), (128, 512, 1024, 2048, 4096)

_DEEPEST_DELTA_NLL = 2.0  # of the smallest budget, nats per token
# Below and above the bytes of all items at lowest levels.
_TIGHT_BUDGETS, _LOOSE_BUDGETS = 4, 10
_BEGIN, _END = '<script type="application/json" id="data">', "</script>"


class Explorer:
    """Computes what the page shows, from what the package has of the default model."""

    def __init__(self) -> None:
        path = table_path(TABLE, "native")
        assert path is not None  # it is in the package
        self.table = ScoreTable.load(path)
        assert self.table.held_out is not None  # the packaged table has held-out losses
        self.held_out = self.table.held_out
        self.context = TableContext(self.table, TABLE, importance="one_shot")
        self.memory = self.context.memory
        self.ladder_bytes = LadderBytes(self.memory, Ladder.of(self.memory.facts, "all"))
        names = {name for item in self.ladder_bytes.ladder.items for name in item.levels}
        self.levels = [name for name in LEVEL_COLOURS if name in names]

    def data(
        self, batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS
    ) -> dict[str, Any]:
        """The plans of all methods at each batch size, length and budget.

        Returns:
            JSON values. ``choices`` has, by method, shape (batch, then length) and budget,
            the number of a plan, the bytes of its caches and those of the rest; ``plans``
            has, by number, what `plan_row` returns.
        """
        policies = [make_method(name, self.context, self.ladder_bytes) for name in METHODS]
        shapes = [(batch, length) for batch in batches for length in lengths]
        budgets = [self.budgets(shape) for shape in shapes]
        plans: dict[Plan, int] = {}

        def choice(policy: Policy, request: Request) -> list[int]:
            plan = policy.choose(request)
            parts = self.memory.breakdown(plan, request)
            return [plans.setdefault(plan, len(plans)), parts.kv_cache, parts.workspace]

        choices = [
            [
                [choice(policy, Request(*shape, budget_bytes=budget)) for budget in row]
                for shape, row in zip(shapes, budgets, strict=True)
            ]
            for policy in progress_bar(True, policies, desc="plans", unit="method")
        ]
        return {
            "measured": len(self.table.scores),
            "tokens": self.held_out.text["window_tokens"],
            "error": self.held_out.fidelity.rows[0].median_relative_error,
            "batches": batches,
            "lengths": lengths,
            "budgets": budgets,
            "natives": [self.memory.native_peak_bytes(*shape) for shape in shapes],
            "tight": _TIGHT_BUDGETS - 1,
            "levels": [[name, LEVEL_COLOURS[name]] for name in self.levels],
            "methods": [[look(m).label, look(m).colour, what] for m, what in METHODS.items()],
            "choices": choices,
            "plans": list(map(self.plan_row, plans)),
        }

    def budgets(self, shape: tuple[int, int]) -> list[int]:
        """Budgets for a request, in bytes: from one that costs 2 nats to the native peak.

        The last of the tight ones is the least at which no block has to be removed.
        """
        known = self.context.frontier.on(self.ladder_bytes.ladder)
        peaks = known.peak_bytes(self.ladder_bytes.costs(*shape))
        native = self.memory.native_peak_bytes(*shape)
        lowest = peaks[[not plan.removed for plan in known.plans]].min()
        least = peaks[known.delta_nll < _DEEPEST_DELTA_NLL].min()
        tight = np.linspace(least, lowest, _TIGHT_BUDGETS)
        loose = np.geomspace(lowest, native, _LOOSE_BUDGETS + 1)[1:-1]
        return [*map(int, tight), *map(int, loose), native]

    def plan_row(self, plan: Plan) -> list[Any]:
        """What the page knows of a plan, whatever the request.

        Returns:
            Its levels (a digit for each item: attention, caches, FFN by layer, then
            embeddings), the bytes of its weights and embeddings, its ΔNLL on held-out text,
            and whether that was measured.
        """
        by_kind = item_levels(plan.levels, self.memory.facts.num_layers).values()
        digits = "".join(str(self.levels.index(level)) for kind in by_kind for level in kind)
        scorer = self.context.scorer
        delta_nll = self.held_out.delta_nll(plan, scorer.nll(plan) - scorer.native_nll)
        parts = self.memory.breakdown(plan, Request(1, 1, budget_bytes=1))
        measured = int(not self.held_out.is_predicted(plan))
        return [digits, parts.weights, parts.embeddings, round(delta_nll, 3), measured]


def with_data(page: str, data: dict[str, Any]) -> str:
    """A page with other values of `Explorer.data`."""
    head, _, rest = page.partition(_BEGIN)
    return f"{head}{_BEGIN}{canonical_json(data)}{_END}{rest.partition(_END)[2]}"


@click.command(help=__doc__)
def main() -> None:
    """Write the page with new data."""
    write_text(PAGE, with_data(PAGE.read_text(encoding="utf-8"), Explorer().data()))
    print(PAGE)


if __name__ == "__main__":
    main()
