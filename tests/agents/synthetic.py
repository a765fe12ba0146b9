"""A model whose losses are known by formula: no network is run, so optima are known too.

It serves two kinds of tests: baselines on cases with a known answer (`interaction=0`: losses
add up), and learning in seconds (`interaction > 0`: like a real model, neighbours that each
look cheap are dear together).
"""

from functools import cached_property
from types import SimpleNamespace

import numpy as np

from rap_env.envs.prune import RAPPruneEnv, RAPPruneVectorEnv
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import OneShotProfile
from rap_env.ladder.features import ImportanceFeatures
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import Plan
from rap_env.request import Request
from tests.made_facts import made_facts

DENSE_NLL = 2.5

ONE_OF_EACH_KIND = ("maskable_ppo", "masked_dqn")
"""An agent with a policy and one with Q values, where the code under test knows no other kinds."""


def facts(layers: int = 4, attn_bytes: int = 1000, ffn_bytes: int = 3000) -> ModelFacts:
    names = {"name": "synthetic", "fingerprint": "0" * 64}
    return made_facts(layers, attn_bytes, ffn_bytes, ffn_width=1, **names)


class SyntheticScorer:
    """NLL = dense + sum of costs + interaction of neighbours, saturating at `cap` nats."""

    num_windows = 4

    def __init__(self, costs, interaction=0.0, cap=np.inf):
        self.costs = np.asarray(costs, dtype=float)
        index = np.arange(len(self.costs))
        near = np.exp(-np.abs(index[:, None] - index[None]) / 4) * (1 - np.eye(len(index)))
        self.pairs = interaction * near * np.sqrt(np.outer(np.abs(self.costs), np.abs(self.costs)))
        self.cap = cap
        self.evaluations = 0
        self.windows_run = 0
        self.block_forwards = 0
        self.evaluation_s = 100.0
        self.scores = {}

    def loss(self, mask):
        removed = np.zeros(len(self.costs))
        removed[sorted(mask.removed)] = 1
        total = removed @ self.costs + removed @ self.pairs @ removed / 2
        return total if np.isinf(self.cap) else self.cap * (1 - np.exp(-total / self.cap))

    @property
    def passes(self):
        return self.evaluations + self.windows_run / self.num_windows

    def nll_on(self, masks, windows):
        """Every window has the same loss."""
        new = {mask for mask in masks if mask not in self.scores}
        self.windows_run += len(new) * len(windows)
        return [DENSE_NLL + float(self.loss(mask)) for mask in masks]

    @property
    def known(self):
        return len(self.scores)

    @property
    def native_nll(self):
        return self.nll(Plan())

    def nll(self, mask):
        if mask not in self.scores:
            self.scores[mask] = DENSE_NLL + float(self.loss(mask))
            self.evaluations += 1
            self.block_forwards += len(self.costs) - len(mask.removed)
        return self.scores[mask]

    def nll_many(self, masks):
        return [self.nll(mask) for mask in masks]

    def is_predicted(self, mask):
        return False


class SyntheticContext:
    """A fake pruning context: memory, scorer, importance and features."""

    def __init__(self, costs, model=None, **scorer):
        self.memory = MemoryModel(model or facts(len(costs) // 2))
        self.scorer = SyntheticScorer(costs, **scorer)
        loss = self.scorer.loss
        count = len(costs)
        rise = np.array([loss(Plan.removing(i)) for i in range(count)])
        self.one_shot = OneShotProfile(
            dense_nll=DENSE_NLL,
            nll_without=tuple(DENSE_NLL + rise),
            influence=tuple(rise[::-1]),
            provenance={"text": {"window_tokens": 256}},
            evaluations=count + 1,
            evaluations_run=count + 1,
            block_forwards=0.0,
            seconds=0.0,
        )
        order, mask, marginal = [], Plan(), np.zeros(count)
        for _ in range(count):
            rest = [i for i in range(count) if i not in mask.removed]
            best = min(rest, key=lambda i: loss(mask.without(i)))
            marginal[best] = loss(mask.without(best)) - loss(mask)
            order.append(best)
            mask = mask.without(best)
        self.layer_influence = self.one_shot.block_influence.reshape(-1, 2).sum(axis=1)
        self.gsi = SimpleNamespace(full_order=tuple(order), evaluations=100)
        rank = np.argsort(order) / (count - 1)
        self.features = ImportanceFeatures(rise, rank, marginal)

    @cached_property
    def frontier(self):
        """For each pair of counts the blocks of each kind that alone cost least."""
        order = np.argsort(self.one_shot.delta_nll)
        attn, ffn = [int(i) for i in order if not i % 2], [int(i) for i in order if i % 2]
        masks = [
            Plan.removing(*attn[:a], *ffn[:f])
            for a in range(len(attn) + 1)
            for f in range(len(ffn) + 1)
        ]
        return PlanTable(
            num_layers=len(order) // 2,
            dense_nll=DENSE_NLL,
            scores={m: DENSE_NLL + float(self.scorer.loss(m)) for m in masks},
            evaluations_run=len(masks),
            seconds=0.0,
            settings={},
            provenance={},
        )


def block_context(layers=15, seed=0):
    costs = np.random.default_rng(seed).lognormal(-3, 0.8, 2 * layers)
    return SyntheticContext(costs, interaction=2.0, cap=12.0)


def make_env(context, **settings):
    """`RAPPrune-v0` itself, on losses that cost nothing."""
    return lambda: RAPPruneEnv(context=context, **settings)


def make_envs(context, **settings):
    """Many of them, stepped together."""
    return lambda num_envs: RAPPruneVectorEnv(
        context=context, num_envs=num_envs, autoreset_mode="SameStep", **settings
    )


def request_at(context, batch_size, seq_len_tokens, fraction):
    return Request.at_fraction(context.memory, batch_size, seq_len_tokens, fraction)
