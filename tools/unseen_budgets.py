"""Sets the budgets of the tasks `RAPLadder/Unseen-*`: ``python -m tools.unseen_budgets``.

At the five budgets of a model, the order by cost per byte loses about `ORDER_LOSSES` on the
calibration text. A smaller budget may lose less, because the order is not optimal; so budgets
come from the mean of the least loss at smaller and the greatest at larger budgets.
"""

import json
from pathlib import Path

import click
import numpy as np

from rap_env.envs.ladder import RAPLadderEnv
from rap_env.leaderboard import unseen
from rap_env.policies.loading import make_method
from rap_env.request import Request

GRID = 200
"""Budgets that are tried, from the native peak down to the least possible one."""


def budgets_of(model: str) -> list[int]:
    """The budgets of a model in bytes, from the largest down."""
    env = RAPLadderEnv(model, **unseen.ARGUMENTS)
    order = make_method("cost_per_byte", env.context, env.encoder.ladder_bytes)
    costs = env.encoder.ladder_bytes.costs(unseen.BATCH_SIZE, unseen.SEQ_LEN_TOKENS)
    budgets = np.linspace(costs.dense_peak_bytes - 1, costs.least_peak_bytes, GRID).astype(int)
    shape = unseen.BATCH_SIZE, unseen.SEQ_LEN_TOKENS
    plans = [order.choose(Request(*shape, budget)) for budget in budgets.tolist()]
    losses = np.array(env.context.scorer.nll_many(plans)) - env.context.scorer.dense_nll
    most = np.maximum.accumulate(losses)
    least = np.minimum.accumulate(losses[::-1])[::-1]
    places = [int(np.argmax((most + least) / 2 >= loss)) for loss in unseen.ORDER_LOSSES]
    return budgets[places].tolist()


@click.command(help=__doc__)
def main() -> None:
    """Write the budgets of all models."""
    budgets = {model: budgets_of(model) for models in unseen.PARTS.values() for model in models}
    path = Path(unseen.__file__).with_name("unseen.json")
    lines = [f" {json.dumps(model)}: {json.dumps(given)}" for model, given in budgets.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
