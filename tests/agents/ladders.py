"""`RAPLadder-v0` on a model whose losses are known by formula, for agents to learn on."""

from dataclasses import replace

import numpy as np

from rap_env.context.base import make_encoder
from rap_env.envs.ladder import RAPLadderVectorEnv
from rap_env.ladder.observation import ObservationEncoder
from rap_env.levels import CACHE_LADDER
from rap_env.memory import MemoryModel
from rap_env.request import Request
from tests.policies.test_knapsack import costs as costs_of
from tests.policies.test_knapsack import facts

SPEC = {"levels": "all", "together": ["int8", "int4"]}
WORKLOAD = {"name": "grid", "batch_sizes": [2, 8], "seq_lens_tokens": [500, 2000],
            "budget_fractions": [0.35, 0.5, 0.7]}  # fmt: skip
SHAPES = [(1, 30), (2, 500), (8, 2000)]
FRACTIONS = np.linspace(0.35, 0.95, 7)


class FormulaScorer:
    """NLL = native NLL + the sum of the costs of levels."""

    num_windows = 4
    evaluation_s = 100.0

    def __init__(self, costs):
        self.costs = costs
        self.native_nll = costs.native_nll
        self.asked = set()

    @property
    def known(self):
        return len(self.asked)

    def loss(self, plan):
        return self.costs.delta_nll(plan)

    def nll(self, plan):
        self.asked.add(plan)
        return self.native_nll + self.loss(plan)

    def nll_many(self, plans):
        return [self.nll(plan) for plan in plans]

    def is_predicted(self, plan):
        return False


class LadderContext:
    """A fake pruning context with level costs."""

    def __init__(self, layers=3, seed=0, importance="one_shot", **changed):
        made = facts(layers=layers, **changed)
        costs = costs_of(made, seed, caches=CACHE_LADDER, window_tokens=1024)
        smaller = {
            item: {level: cost / 10 for level, cost in levels.items()}
            for item, levels in costs.costs.items()
        }
        self.costs = replace(costs, costs=smaller)
        self.memory = MemoryModel(made)
        self.scorer = FormulaScorer(self.costs)
        self.importance = importance

    def level_costs(self, ladder):
        return self.costs


def encoder_of(context, spec=SPEC) -> ObservationEncoder:
    return make_encoder(context, "ladder", **spec)


def make_envs(context, spec=SPEC, **settings):
    """Environments, stepped together."""
    return lambda num_envs: RAPLadderVectorEnv(
        context=context, num_envs=num_envs, autoreset_mode="SameStep",
        **{"workload": WORKLOAD, **spec, **settings},
    )  # fmt: skip


def requests_of(context):
    return [
        Request.at_fraction(context.memory, *shape, fraction)
        for shape in SHAPES
        for fraction in FRACTIONS
    ]


def feasible(builder, requests):
    """The requests that some plan of the ladder fits."""
    return [
        request
        for request in requests
        if builder.ladder_bytes.costs(request.batch_size, request.seq_len_tokens).least_peak_bytes
        <= request.budget_bytes
    ]
