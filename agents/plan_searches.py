"""Searches over the plans of a model as arrays, and methods that are made of them.

`Bench` makes, measures and remembers plans of one model. A method on it may run some plans of a
request, and takes the best one.

Shapes: n plans or requests, N items, W levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from agents.trained_policy import PlanObserver
from rap_env.context.base import make_encoder
from rap_env.envs.base import PruningEnv
from rap_env.errors import InvalidRequestError
from rap_env.importance.gradient_costs import native_changes
from rap_env.ladder.features import BYTES_OVER, COST_CEILING, COST_FLOOR, EveryLevel
from rap_env.ladder.items import Counts, Ladder
from rap_env.ladder.observation import Observation, ObservationEncoder
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.request import Request
from rap_env.scoring.scorer import PlanScorer
from rap_env.workload.sampler import GridSampler

Floats = npt.NDArray[np.float64]

_FREED, _COST = (EveryLevel.features.index(name) for name in ("freed_share", "one_shot_cost"))
_COST_SCALE = float(np.log1p(COST_CEILING / COST_FLOOR))
_USEFUL_FLOOR = 1e-4
_MOST_RAISED = 3  # items of one mutation
_UNITS = 1_500  # into which a knapsack divides its bytes


class Bench:
    """A model with some requests: plays plans as arrays, measures them, and remembers all.

    Args:
        encoder: Encodes observations of the model, with the columns of `EveryLevel`.
        requests: The requests, of one shape; plans name them by number.
        losses_of: Gives the losses of plans, nats per token: measures or predicts them.

    Attributes:
        encoder: As given.
        ladder: The items.
        requests: The requests.
        every: Their numbers, (requests,).
        observer: Observes plans.
        known: All plans whose losses were asked for, (known, N).
        losses: Their losses, (known,).
        sizes: Bytes of the levels of each item, infinite where there is none, (N, W + 1).
        log_costs: Logs of the costs of the levels below the native one, (N, W).
        lowest: The positions of the lowest levels, (N,).
        constant_bytes: Most bytes of the first request beside those if an item is lowered.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        requests: Sequence[Request],
        losses_of: Callable[[Counts], Floats],
    ) -> None:
        self.encoder, self.ladder = encoder, encoder.ladder
        self.requests, self.every = requests, np.arange(len(requests))
        self.observer, self._losses_of = PlanObserver(encoder, requests), losses_of
        self.known, self.losses = self.observer.start(0), np.zeros(0)
        self._numbers: dict[bytes, int] = {}
        first, counts = requests[0], np.array([len(item.levels) for item in self.ladder.items])
        exists = np.arange(self.ladder.width - 1) < counts[:, None]
        of_shape = encoder.ladder_bytes.costs(first.batch_size, first.seq_len_tokens)
        self.sizes = np.where(exists, of_shape.item_bytes[:, :-1], np.inf)
        costs = cast(EveryLevel, encoder.importance).one_shot
        self.log_costs = np.log(np.maximum(costs, COST_FLOOR))[:, 1:-1]
        self.lowest = counts - 1
        alone = np.eye(len(self.ladder), dtype=np.int64)
        own_bytes = self.sizes[np.arange(len(alone)), alone].sum(axis=1)
        self.constant_bytes = int((of_shape.peaks(alone) - own_bytes).max())

    @classmethod
    def of(cls, env: PruningEnv) -> Self:
        """A model with the requests of its episodes, which its workload lists; plans are run."""
        scorer, requests = env.context.scorer, cast(GridSampler, env.sampler).requests
        return cls(env.encoder, requests, partial(run, env.ladder, scorer, scorer.native_nll))

    def measure(self, positions: Counts) -> Floats:
        """Losses of plans, nats per token, (n,)."""
        keys = [row.tobytes() for row in positions.astype(np.int8)]
        new = {k: row for k, row in zip(keys, positions, strict=True) if k not in self._numbers}
        if new:
            rows = np.stack([*new.values()])
            self._numbers |= {key: len(self.losses) + n for n, key in enumerate(new)}
            self.known = np.concatenate([self.known, rows])
            self.losses = np.concatenate([self.losses, self._losses_of(rows)])
        return self.losses[[self._numbers[key] for key in keys]]

    def noisy(
        self,
        which: Counts,
        rng: np.random.Generator,
        start: Counts | None = None,
        scale: float = 1.0,
    ) -> Counts:
        """Plans by cost per useful byte, each with other noise on the logs of all prices."""
        noise = rng.normal(0, scale, (len(which), len(self.ladder), self.ladder.width))
        return self.priced(which, noise, start)

    def priced(
        self, which: Counts, extra: Floats, start: Counts | None = None, weight: float = 1.0
    ) -> Counts:
        """Plans that lower the item with the least price, step by step, (n, N).

        Args:
            which: The requests.
            extra: What is added to a price at each level, (n, N, W).
            start: The plans to begin with; None for native ones.
            weight: Weight of the log of the cost per useful byte.
        """
        positions = self.observer.start(len(which)) if start is None else start.copy()
        while len(active := np.flatnonzero(self.observer.over_bytes(which, positions))):
            of, now = which[active], positions[active]
            seen = self.observer.observe(of, now)
            own = np.take_along_axis(extra[active], now[..., None], axis=2)[..., 0]
            prices = own + weight * log_prices(seen)
            items = np.where(seen["action_mask"] > 0, prices, np.inf).argmin(axis=1)
            positions[active] = self.observer.act(of, now, items)
        return positions

    def knapsack(self, request: int, log_costs: Floats) -> Counts:
        """The plans that fit a request whose costs have the least sums, (n, N).

        Args:
            request: The number of the request.
            log_costs: Logs of the costs of the levels below the native one, (n, N, W).
        """
        count = len(log_costs)
        budget_bytes = self.requests[request].budget_bytes - self.constant_bytes
        sizes = np.ceil(self.sizes * (_UNITS / max(1, budget_bytes)))
        costs = np.concatenate([np.zeros((count, len(self.ladder), 1)), np.exp(log_costs)], axis=2)
        least, choices = np.zeros((count, _UNITS + 1)), []
        for item, row in enumerate(sizes):
            options = np.full((len(row), count, _UNITS + 1), np.inf)
            for level, size in enumerate(row):
                if size <= _UNITS:
                    kept = _UNITS + 1 - int(size)
                    options[level, :, int(size) :] = least[:, :kept] + costs[:, item, level, None]
            choices.append(options.argmin(axis=0))
            least = options.min(axis=0)
        positions = np.tile(self.lowest, (count, 1))
        fits, left = np.isfinite(least[:, -1]), np.full(count, _UNITS)
        for item in reversed(range(len(sizes))):
            chosen = choices[item][np.arange(count), left]
            positions[fits, item] = chosen[fits]
            left = np.maximum(0, left - sizes[item, chosen].clip(max=_UNITS).astype(np.int64))
        return positions

    def mutated(self, which: Counts, positions: Counts, rng: np.random.Generator) -> Counts:
        """Plans near others: some items are raised, then all are lowered until they fit again."""
        raised = positions.copy()
        for row in raised:
            lowered = np.flatnonzero(row)
            some = rng.permutation(lowered)[: rng.integers(1, _MOST_RAISED + 1)]
            row[some] = rng.integers(0, row[some])
        return self.noisy(which, rng, raised)

    def fitting(self, request: int) -> Counts:
        """The numbers of the known plans that fit a request, those that lose least first."""
        order = np.argsort(self.losses, kind="stable")
        over = self.observer.over_bytes(np.full(len(order), request), self.known[order])
        return np.asarray(order[over == 0])

    def best(self, which: Counts, most: int = 1) -> Counts:
        """The known plans that fit requests and lose least, (n, N): one of the best `most`."""
        fitting = {request: self.fitting(request)[:most] for request in set(which.tolist())}
        pairs = enumerate(which.tolist())
        return self.known[[fitting[r][number % len(fitting[r])] for number, r in pairs]]

    def search(self, rng: np.random.Generator, noisy: int, rounds: int, offspring: int) -> None:
        """Measure noisy orders for each request, then mutations of the best known plans."""
        self.measure(self.noisy(self.every.repeat(noisy), rng))
        for _ in range(rounds):
            which = self.every.repeat(offspring)
            self.measure(self.mutated(which, self.best(which, most=3), rng))


def run(ladder: Ladder, scorer: Any, native_nll: float, positions: Counts) -> Floats:
    """Losses of plans that a scorer runs, nats per token, (n,)."""
    return np.array(scorer.nll_many([*map(ladder.plan, positions.tolist())])) - native_nll


def log_prices(seen: Observation) -> Floats:
    """Logs of the cost of each item's next level per useful byte, (n, N)."""
    rows, over = seen["ladder"], seen["request"][:, [BYTES_OVER]]
    useful = np.minimum(rows[..., _FREED], over + _USEFUL_FLOOR) + _USEFUL_FLOOR
    return np.asarray(rows[..., _COST] * _COST_SCALE - np.log(useful))


class Tries(Method):
    """Base of methods that run some plans of a request and take the best; one is not run.

    Attributes:
        max_evaluations: Plans that are run at most.
    """

    max_evaluations = 1

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        spec = {"layout": "ladder", **self.ladder.spec, "every_level": True}
        self._encoder = make_encoder(self.context, **spec)

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        native_nll = self.context.scorer.native_nll if self.max_evaluations > 1 else 0.0
        losses_of = partial(run, self.ladder, scores, native_nll)
        bench = Bench(self._encoder, [request], losses_of)
        return self.ladder.plan(self._plan(bench, self.random(request)).tolist())

    def _plan(self, bench: Bench, rng: np.random.Generator) -> Counts:
        """The chosen plan, (N,)."""
        plans = self._plans(bench, rng)
        if self.max_evaluations > 1:
            bench.measure(plans[: self.max_evaluations])
            plans = bench.best(bench.every)
        return np.asarray(plans[0])

    @abstractmethod
    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        """The plans to run, (n, N), the most promising one first."""


class NoisyOrders(Tries):
    """The order by cost per useful byte, and others with noise on the logs of the prices.

    Attributes:
        scales: Standard deviations of the noise, of the first plan and of the others.
    """

    name = "noisy_orders"
    scales = 0.0, 1.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        which = bench.every.repeat(self.max_evaluations)
        parts = zip((which[:1], which[1:]), self.scales, strict=True)
        return np.concatenate([bench.noisy(which, rng, scale=scale) for which, scale in parts])


class Evolved(Tries):
    """Noisy orders, then mutations of the best plans so far."""

    name = "evolved"

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        few = -(-self.max_evaluations // 4)
        known = bench.noisy(bench.every.repeat(few), rng)
        while few < self.max_evaluations:
            bench.measure(known)
            which = bench.every.repeat(min(few, self.max_evaluations - few))
            known = bench.mutated(which, bench.best(which, few), rng)
            few += len(which)
        return known


class Searched(Tries):
    """Base of searches on predicted losses."""

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        predicted = Bench(bench.encoder, bench.requests, partial(self._predicted, bench))
        predicted.search(rng, noisy=64, rounds=8, offspring=32)
        return predicted.known[predicted.fitting(0)]

    @abstractmethod
    def _predicted(self, bench: Bench, positions: Counts) -> Floats:
        """Losses of plans, or what rises with them, (n,)."""


class CrossTerms(Searched):
    """A quadratic knapsack: costs of levels, and of each two of them together.

    With g·δ as in `rap_env.importance.gradient_costs`, two levels cost their sum and the mean of
    the product of theirs over tokens. The idea is that of IMPQ (arXiv 2509.15455).
    """

    name = "cross_terms"

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        scorer = self.context.scorer
        if not isinstance(scorer, PlanScorer):
            raise InvalidRequestError(
                "cross_terms needs a running model for its gradients; this task reads a table of "
                "scores. Take a task whose plans are run, such as RAPLadder/Unseen-Tune-v1."
            )
        levels = {i.name: i.levels[1:] for i in self.ladder.items if i.kind != "embeddings"}
        made = native_changes(scorer.llm, scorer.corpus.tokens, levels)
        windows, tokens = scorer.corpus.tokens.shape
        self._predicted_tokens = windows * (tokens - 1)
        self._changes = np.zeros((len(self.ladder), self.ladder.width, windows * tokens))
        for row, item in zip(self._changes, self.ladder.items, strict=True):
            for position, level in enumerate(item.levels[1:] if item.name in made else (), 1):
                row[position] = made[item.name][level].flatten()

    def _predicted(self, bench: Bench, positions: Counts) -> Floats:
        items = np.arange(len(self.ladder))
        costs = np.c_[np.zeros(len(items)), np.exp(bench.log_costs)][items, positions].sum(axis=1)
        changes = self._changes[items, positions]
        pairs = changes.sum(axis=1) ** 2 - (changes**2).sum(axis=1)
        return np.asarray(costs + pairs.sum(axis=1) / 2 / self._predicted_tokens)


class Uniform(Tries):
    """All items one level lower after the other; the order within a level is tuned elsewhere.

    Attributes:
        ffn: What is added for FFN blocks, in layers: below 0 they come first.
        depth: 1 begins with the first layer, -1 with the last one.
    """

    name = "uniform"
    ffn, depth = 0.0, -1

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        places = [
            [self.depth * (item.layer or 0) + self.ffn * (item.kind == "ffn")]
            for item in self.ladder.items
        ]
        extra = np.arange(self.ladder.width) + np.array(places) / len(places)
        return bench.priced(bench.every, extra[None], weight=0.0)


def variant(kind: type[Tries], **attributes: Any) -> type[Tries]:
    """A method with other attributes, as `rap_env.evaluate` takes it."""
    return type(kind.__name__, (kind,), attributes)
