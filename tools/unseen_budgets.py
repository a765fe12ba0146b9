"""Sets the budgets of the tasks `RAPLadder/Unseen-*`: ``python -m tools.unseen_budgets``.

At the five budgets of a model, the order by cost per byte loses about `ORDER_LOSSES` on the
calibration text. A smaller budget may lose less, because the order is not optimal; so budgets
come from the mean of the least loss at smaller and the greatest at larger budgets.
"""

import json
from pathlib import Path

import click
import numpy as np

from rap_env.envs.across import RAPAcrossEnv
from rap_env.leaderboard import unseen
from rap_env.policies.loading import make_method
from rap_env.request import Request

GRID = 200
"""Budgets that are tried, from the native peak down to the least possible one."""


def budgets_of(model: str) -> list[int]:
    """The budgets of a model in bytes, from the largest down."""
    env = RAPAcrossEnv([model], **unseen.ARGUMENTS).env_of(model)
    order = make_method("cost_per_byte", env.context, env.encoder.ladder_bytes)
    costs = env.encoder.ladder_bytes.costs(*unseen.SHAPE)
    budgets = np.linspace(costs.native_peak_bytes - 1, costs.least_peak_bytes, GRID).astype(int)
    plans = [order.choose(Request(*unseen.SHAPE, budget)) for budget in budgets.tolist()]
    losses = np.array(env.context.scorer.nll_many(plans)) - env.context.scorer.native_nll
    most = np.maximum.accumulate(losses)
    least = np.minimum.accumulate(losses[::-1])[::-1]
    places = [int(np.argmax((most + least) / 2 >= loss)) for loss in unseen.ORDER_LOSSES]
    return budgets[places].tolist()


@click.command(help=__doc__)
def main() -> None:
    """Write the budgets of all models."""
    path = Path(unseen.__file__).with_name("unseen.json")
    fixed = json.loads(path.read_text(encoding="utf-8"))
    for models in fixed["budgets_bytes"].values():
        models |= {model: budgets_of(model) for model in models}
    path.write_text(json.dumps(fixed, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
