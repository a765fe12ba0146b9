"""Policies for models that were never run: they correct the costs that a knapsack adds up.

A knapsack over measured costs of single levels ignores what levels cost together. A network with
attention between the items of a model, the actor, corrects the logarithm of each cost, for the
request. It learns on plans of other models that run: a plan becomes more likely if it loses less
than others for the request. A critic, which predicts the losses of plans, chooses among the
knapsacks over the corrected costs with noise. If plans may be run, a Gaussian process over what
the critic got wrong chooses the next ones. `Bench` searches plans of a model.

Shapes: n plans or requests, N items, W levels, F features of an item, R entries of the request,
H hidden width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from agents.trained_policy import PlanObserver
from rap_env.context.base import make_encoder
from rap_env.envs.base import PruningEnv
from rap_env.ladder.features import (
    BYTES_OVER,
    COST_CEILING,
    COST_FLOOR,
    REQUEST_FEATURES,
    SHOWN_LEVELS,
    EveryLevel,
)
from rap_env.ladder.items import Counts, Ladder
from rap_env.ladder.observation import Observation, ObservationEncoder
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.request import Request
from rap_env.workload.sampler import GridSampler

Floats = npt.NDArray[np.float64]
Tensors = dict[str, torch.Tensor]

LOSS_OFFSET = 0.05
"""Added to losses before their logarithm is taken, nats per token."""

_FREED, _COST = (EveryLevel.features.index(name) for name in ("freed_share", "one_shot_cost"))
_LEVELS = EveryLevel.features.index("cost1")
_REMOVED_AT = 3  # the position of removal in the ladders that networks are trained on
_COST_SCALE = float(np.log1p(COST_CEILING / COST_FLOOR))
_USEFUL_FLOOR = 1e-4
_MOST_RAISED = 3  # items of one mutation
_INPUT_NOISE = 0.05  # while a network is trained, because models are few
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
        count: Number of requests.
        observer: Observes plans.
        known: All plans whose losses were asked for, (known, N).
        losses: Their losses, (known,).
        sizes: Bytes of the levels of each item, infinite where there is none, (N, W + 1).
        log_costs: Logs of the costs of the levels below the native one, (N, W).
        lowest: The positions of the lowest levels, (N,).
        removals: The items whose removal is at another position than networks know, and it.
        constant_bytes: Most bytes of the first request beside those if an item is lowered.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        requests: Sequence[Request],
        losses_of: Callable[[Counts], Floats],
    ) -> None:
        self.encoder, self.ladder = encoder, encoder.ladder
        self.requests, self.count = requests, len(requests)
        self.observer, self._losses_of = PlanObserver(encoder, requests), losses_of
        self.known, self.losses = self.observer.start(0), np.zeros(0)
        self._numbers: dict[bytes, int] = {}
        exists = np.arange(self.ladder.width) < [[len(item.levels)] for item in self.ladder.items]
        most = exists.sum(axis=1).max()
        first = requests[0]
        of_shape = encoder.ladder_bytes.costs(first.batch_size, first.seq_len_tokens)
        self.sizes = np.where(exists, of_shape.item_bytes, np.inf)[:, :most]
        costs = cast(EveryLevel, encoder.importance).one_shot
        self.log_costs = np.log(np.maximum(costs, COST_FLOOR))[:, 1:most]
        self.lowest = exists.sum(axis=1) - 1
        self.removals = [
            (number, item.levels.index("removed"))
            for number, item in enumerate(self.ladder.items)
            if "removed" in item.levels[:_REMOVED_AT]
        ]
        alone = np.eye(len(self.ladder), dtype=np.int64)
        own_bytes = self.sizes[np.arange(len(alone)), alone].sum(axis=1)
        self.constant_bytes = int((of_shape.peaks(alone) - own_bytes).max())

    @classmethod
    def of(cls, env: PruningEnv) -> Self:
        """A model with the requests of its episodes, which its workload lists; plans are run."""
        scorer, requests = env.context.scorer, cast(GridSampler, env.sampler).requests
        return cls(env.encoder, requests, partial(run, env.ladder, scorer, scorer.dense_nll))

    def observed(self, which: Counts, positions: Counts) -> Tensors:
        """What networks see of plans for requests: removal in the columns that it always has."""
        seen = tensors(self.observer.observe(which, positions))
        columns = seen["ladder"][..., _LEVELS:].view(*seen["ladder"].shape[:2], SHOWN_LEVELS, 2)
        for item, last in self.removals:
            columns[:, item, _REMOVED_AT - 1] = columns[:, item, last - 1]
            columns[:, item, last - 1] = 0
        return seen

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
        width = max(len(item.levels) for item in self.ladder.items) + 1
        noise = rng.normal(0, scale, (len(which), len(self.ladder), width))
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

    def noisy_log_costs(self, means: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Logs of corrected costs, each time with other noise but for the first time.

        Args:
            means: The corrections for some requests, (n, N, W).
            count: How often.
            rng: Draws the noise.

        Returns:
            (count, n, N, W).
        """
        noise = rng.normal(0, NOISE, (count, *means.shape))
        noise[0] = 0
        return np.asarray(self.log_costs + means + noise)

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
        every = np.arange(self.count)
        self.measure(self.noisy(every.repeat(noisy), rng))
        for _ in range(rounds):
            which = every.repeat(offspring)
            self.measure(self.mutated(which, self.best(which, most=3), rng))


def run(ladder: Ladder, scorer: Any, dense_nll: float, positions: Counts) -> Floats:
    """Losses of plans that a scorer runs, nats per token, (n,)."""
    return np.array(scorer.nll_many([*map(ladder.plan, positions.tolist())])) - dense_nll


def log_prices(seen: Observation) -> Floats:
    """Logs of the cost of each item's next level per useful byte, (n, N)."""
    rows, over = seen["ladder"], seen["request"][:, [BYTES_OVER]]
    useful = np.minimum(rows[..., _FREED], over + _USEFUL_FLOOR) + _USEFUL_FLOOR
    return np.asarray(rows[..., _COST] * _COST_SCALE - np.log(useful))


class _Attention(nn.Module):
    """A block of attention between items, with one head; plain products are faster for few."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        shape = states.shape[-1:]
        query, key, value = self.enter(functional.rms_norm(states, shape)).chunk(3, dim=-1)
        weights = (query @ key.transpose(1, 2) / shape[0] ** 0.5).softmax(dim=-1)
        states = states + self.leave(weights @ value)
        inner = torch.relu(self.up(functional.rms_norm(states, shape)))
        return torch.add(states, self.down(inner))


class SetNetwork(nn.Module):
    """Attention between the items of a plan; numbers for each level of an item, and for the plan.

    Args:
        width: H.
        blocks: Blocks of attention.
    """

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(len(EveryLevel.features) + len(REQUEST_FEATURES), width)
        self.blocks = nn.Sequential(*(_Attention(width) for _ in range(blocks)))
        self.levels, self.whole = nn.Linear(width, SHOWN_LEVELS), nn.Linear(width, 1)
        for last in (self.levels, self.whole):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, seen: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Map observations to numbers of the levels of items, (n, N, SHOWN_LEVELS), and (n,)."""
        rows, request = seen["ladder"], seen["request"]
        if self.training:
            rows = rows + _INPUT_NOISE * torch.randn_like(rows)
        shared = request[:, None].expand(-1, rows.shape[1], -1)
        hidden = self.blocks(self.enter(torch.cat([rows, shared], dim=2)))
        return self.levels(hidden), self.whole(hidden.mean(dim=1)).squeeze(1)


def tensors(observation: Observation) -> Tensors:
    """An observation as float32 tensors."""
    return {k: torch.as_tensor(np.asarray(v, dtype=np.float32)) for k, v in observation.items()}


def plan_observations(bench: Bench, positions: Counts) -> Tensors:
    """Observations of plans without a request."""
    seen = bench.observed(np.zeros(len(positions), np.int64), positions)
    return {**seen, "request": torch.zeros_like(seen["request"])}


def predicted_logs(networks: Sequence[SetNetwork], bench: Bench, positions: Counts) -> Floats:
    """Logs of losses that networks predict: their mean and one standard deviation, (n,)."""
    seen = plan_observations(bench, positions)
    with torch.no_grad():
        logs = torch.stack([network.eval()(seen)[1] for network in networks]).numpy()
    return np.asarray(logs.mean(axis=0) + logs.std(axis=0), dtype=np.float64)


def corrections(networks: Sequence[SetNetwork], bench: Bench, which: Counts) -> Floats:
    """What networks add on average to the logs of costs for requests of a model, (n, N, W)."""
    seen = bench.observed(which, bench.observer.start(len(which)))
    with torch.no_grad():
        means = torch.stack([network.eval()(seen)[0] for network in networks]).mean(dim=0)
    for item, last in bench.removals:
        means[:, item, last - 1] = means[:, item, _REMOVED_AT - 1]
    return np.asarray(means[..., : bench.log_costs.shape[1]], dtype=np.float64)


def predictors(benches: Sequence[Bench], count: int, updates: int, seed: int) -> list[SetNetwork]:
    """Networks that predict the logs of the losses of plans, from the known ones of models."""
    data = [(plan_observations(b, b.known), log_losses(b.losses)) for b in benches]

    def loss(network: SetNetwork, rng: np.random.Generator) -> torch.Tensor:
        seen, logs = data[rng.integers(len(data))]
        rows = torch.from_numpy(rng.integers(len(logs), size=_BATCH))
        return functional.mse_loss(network({k: v[rows] for k, v in seen.items()})[1], logs[rows])

    networks = new_networks(count, seed)
    for number, network in enumerate(networks):
        fit(network, loss, updates, np.random.default_rng([seed, number]))
    return networks


def policy(
    benches: Sequence[Bench],
    count: int = 4,
    rounds: int = 4,
    updates: int = 400,
    seed: int = 0,
    note: Callable[[int], object] = lambda number: None,
) -> list[SetNetwork]:
    """Networks whose corrections of costs were learned on plans of models that run.

    In each round, plans of each network with noise are run for each request, and the networks
    are fitted to all plans that ran: a network chooses a plan with a probability that falls with
    the sum of its corrected costs, and the expected logarithm of its loss is made small.

    Args:
        benches: The models.
        count: Networks; their mean corrections are used.
        rounds: Rounds.
        updates: Updates of each network in a round.
        seed: Seed of everything random.
        note: Called after each round with its number.
    """
    networks, rng = new_networks(count, seed), np.random.default_rng(seed)
    for number in range(rounds):
        for bench in benches:
            every = np.arange(bench.count)
            for network in networks:
                means = corrections([network], bench, every)
                costs = bench.noisy_log_costs(means, _TRIED, rng)
                for request in every.tolist():
                    bench.measure(bench.knapsack(request, costs[:, request]))
        choices = [_choices(bench, rng) for bench in benches]
        for network in networks:
            fit(network, partial(_expected_loss, choices), updates, rng)
        note(number)
    return networks


_BATCH, _MODELS_AT_ONCE, _TRIED = 256, 4, 3
NOISE, _TEMPERATURE, _DECAY = 0.3, 0.1, 0.02
"""Noise of the logs of costs; of the choice among plans; and of corrections towards 0."""
_BEST, _OTHERS = 64, 192
"""Known plans of a request that a network chooses among: the best ones, and others."""
_LEARNING_RATE = 3e-3

Choices = tuple[Tensors, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a model: the observations of all requests, (R, ...); some known plans that fit each, (R, C,
N); the logs of their losses, (R, C); and the logs of the costs of levels, (N, W)."""


def _choices(bench: Bench, rng: np.random.Generator) -> Choices:
    every = np.arange(bench.count)
    rows = []
    for fitting in map(bench.fitting, every.tolist()):
        others = rng.permutation(fitting[_BEST:])[:_OTHERS]
        rows.append(np.resize(np.concatenate([fitting[:_BEST], others]), _BEST + _OTHERS))
    chosen = np.stack(rows)
    seen = bench.observed(every, bench.observer.start(len(every)))
    logs = log_losses(bench.losses[chosen])
    return seen, torch.from_numpy(bench.known[chosen]), logs, torch.tensor(bench.log_costs).float()


def _expected_loss(
    choices: Sequence[Choices], network: SetNetwork, rng: np.random.Generator
) -> torch.Tensor:
    """The logs of losses that a network expects on some models, with a penalty on corrections."""
    total = torch.zeros(())
    for number in rng.choice(len(choices), _MODELS_AT_ONCE):
        seen, plans, logs, log_costs = choices[number]
        means = network(seen)[0][..., : log_costs.shape[1]]
        native = torch.zeros(*means.shape[:2], 1)
        costs = torch.cat([native, (log_costs + means).exp()], dim=2)
        of_plans = costs[:, None].expand(-1, plans.shape[1], -1, -1).gather(3, plans[..., None])
        sums = of_plans.sum(dim=(2, 3))
        shares = (-(sums + 1e-3).log() / _TEMPERATURE).softmax(dim=1)
        total = total + (shares * logs).sum(dim=1).mean() + _DECAY * means.square().mean()
    return total


def fit(
    network: SetNetwork,
    loss: Callable[[SetNetwork, np.random.Generator], torch.Tensor],
    updates: int,
    rng: np.random.Generator,
) -> None:
    """Train a network with AdamW on a loss that draws its own data."""
    optimizer = torch.optim.AdamW(network.train().parameters(), _LEARNING_RATE, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, updates, pct_start=0.1)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(network, rng).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()


def new_networks(count: int, seed: int) -> list[SetNetwork]:
    """Untrained networks, which correct no cost."""
    networks = []
    for number in range(count):
        torch.manual_seed(1_000 * seed + number)
        networks.append(SetNetwork())
    return networks


def log_losses(losses: Floats) -> torch.Tensor:
    """Logs of losses, with an offset so that there are some below 0."""
    return torch.tensor(np.log(np.clip(losses, 0, None) + LOSS_OFFSET)).float()


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
        dense_nll = self.context.scorer.dense_nll if self.max_evaluations > 1 else 0.0
        losses_of = partial(run, self.ladder, scores, dense_nll)
        bench = Bench(self._encoder, [request], losses_of)
        return self.ladder.plan(self._plan(bench, self.random(request)).tolist())

    def _plan(self, bench: Bench, rng: np.random.Generator) -> Counts:
        """The chosen plan, (N,)."""
        plans = self._plans(bench, rng)
        if self.max_evaluations > 1:
            bench.measure(plans[: self.max_evaluations])
            plans = bench.best(np.zeros(1, np.int64))
        return np.asarray(plans[0])

    @abstractmethod
    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        """The plans to run, (n, N), the most promising one first."""

    @property
    def _requests(self) -> Counts:
        """The request once for each plan."""
        return np.zeros(self.max_evaluations, np.int64)


class NoisyOrders(Tries):
    """The order by cost per useful byte, and others with noise on the logs of the prices.

    Attributes:
        scales: Standard deviations of the noise, of the first plan and of the others.
    """

    name = "noisy_orders"
    scales = 0.0, 1.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        parts = zip((self._requests[:1], self._requests[1:]), self.scales, strict=True)
        return np.concatenate([bench.noisy(which, rng, scale=scale) for which, scale in parts])


class Evolved(Tries):
    """Noisy orders, then mutations of the best plans so far."""

    name = "evolved"

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        few = -(-self.max_evaluations // 4)
        known = bench.noisy(self._requests[:few], rng)
        while few < self.max_evaluations:
            bench.measure(known)
            parents = bench.best(self._requests[: min(few, self.max_evaluations - few)], few)
            known = bench.mutated(self._requests[: len(parents)], parents, rng)
            few += len(parents)
        return known


class Uniform(Tries):
    """All items one level lower after the other; the order within a level is tuned elsewhere.

    Attributes:
        ffn: What is added for FFN blocks, in layers: below 0 they come first.
        depth: 1 begins with the first layer, -1 with the last one.
    """

    name = "uniform"
    ffn, depth = 0.0, -1

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        layers = len(self.ladder)
        extra = np.zeros((1, layers, self.ladder.width))
        for number, item in enumerate(self.ladder.items):
            place = self.depth * (item.layer or 0) + self.ffn * (item.kind == "ffn")
            extra[0, number] = np.arange(self.ladder.width) + place / layers
        return bench.priced(self._requests[:1], extra, weight=0.0)


class Predicted(Tries):
    """A search on the losses that networks predict: regression on the plans of other models.

    Attributes:
        critics: As of `predictors`.
    """

    name = "predicted"
    critics: Sequence[SetNetwork] = ()

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        def predict(positions: Counts) -> Floats:
            return predicted_logs(self.critics, bench, positions)

        of_critics = Bench(bench.encoder, bench.requests, predict)
        of_critics.search(rng, noisy=64, rounds=8, offspring=32)
        return of_critics.known[of_critics.fitting(0)]


class Corrected(Tries):
    """The knapsack over costs that networks correct, then with noise on the corrections.

    Attributes:
        actors: As of `policy`; untrained ones change no cost.
    """

    name = "corrected"
    actors: Sequence[SetNetwork] = ()

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        return self._knapsacks(bench, rng, self.max_evaluations)[0]

    def _knapsacks(
        self, bench: Bench, rng: np.random.Generator, count: int
    ) -> tuple[Counts, Floats]:
        """The plans, the first one without noise, and the logs of the costs, (N, W)."""
        means = corrections(self.actors, bench, self._requests[:1])
        log_costs = bench.noisy_log_costs(means, count, rng)[:, 0]
        return bench.knapsack(0, log_costs), log_costs[0]


class ActorCritic(Corrected):
    """Plans of the actors and mutations of them, among which critics and runs choose.

    A plan's prior is the mean of the critics' prediction and the log of its corrected costs. A
    Gaussian process over what the plans lose beyond their priors gives the next plans to run, and
    the one of those that is chosen: a few tokens of text measure a loss with an error.

    Attributes:
        critics: As of `predictors`.
    """

    name = "actor_critic"
    critics: Sequence[SetNetwork] = ()

    def _plan(self, bench: Bench, rng: np.random.Generator) -> Counts:
        plans, log_costs = self._knapsacks(bench, rng, _PROPOSED)
        costs = np.c_[np.zeros(len(log_costs)), np.exp(log_costs)]

        def prior(positions: Counts) -> Floats:
            sums = costs[np.arange(len(costs)), positions].sum(axis=1)
            logs = predicted_logs(self.critics, bench, positions)
            return np.asarray((logs + np.log(sums + LOSS_OFFSET)) / 2)

        proposed = Bench(bench.encoder, bench.requests, prior)
        proposed.measure(plans)
        many = np.zeros(_MUTATED, np.int64)
        for _ in range(_SEARCHES):
            proposed.measure(proposed.mutated(many, proposed.best(many, _PARENTS), rng))
        step = -(-self.max_evaluations // _BATCHES)
        while self.max_evaluations > 1 and len(bench.losses) < self.max_evaluations:
            fitting = proposed.fitting(0)
            expected = posterior(bench, proposed, proposed.known[fitting])
            order = proposed.known[fitting[expected.argsort(kind="stable")]]
            ran = {row.tobytes() for row in bench.known}
            new = [row for row in order if row.tobytes() not in ran]
            if not new:
                break
            bench.measure(np.stack(new[: min(step, self.max_evaluations - len(bench.losses))]))
            parents = np.resize(order[:_PARENTS], (_MUTATED, order.shape[1]))
            proposed.measure(proposed.mutated(many, parents, rng))
        known = bench.known if len(bench.losses) else proposed.known[proposed.fitting(0)]
        return np.asarray(known[posterior(bench, proposed, known).argmin()])


_PROPOSED, _SEARCHES, _MUTATED, _PARENTS, _BATCHES = 256, 4, 64, 8, 8
"""Knapsacks; rounds of mutations, their number, and parents; batches of plans that run."""
_SPREAD, _LENGTH, _ERROR = 0.3, 4.0, 0.1
"""Of the Gaussian process: standard deviation of the logs of losses, correlation length in items
that differ, and standard error of a measurement."""


def posterior(bench: Bench, priors: Bench, positions: Counts) -> Floats:
    """What plans are expected to lose after runs of a model: logs, up to a constant, (n,).

    Args:
        bench: The model with the plans that ran.
        priors: Gives the logs of losses that are expected without runs.
        positions: The plans, (n, N).
    """
    expected = priors.measure(positions)
    if not len(bench.losses):
        return expected
    beyond = log_losses(bench.losses).numpy().astype(np.float64) - priors.measure(bench.known)

    def shared(plans: Counts) -> Floats:
        differ = (plans[:, None] != bench.known).sum(axis=2)
        return np.asarray(_SPREAD**2 * np.exp(-differ / _LENGTH))

    gram = shared(bench.known) + _ERROR**2 * np.eye(len(beyond))
    return np.asarray(expected + shared(positions) @ np.linalg.solve(gram, beyond - beyond.mean()))


def variant(kind: type[Tries], **attributes: Any) -> type[Tries]:
    """A method with other attributes, as `rap_env.evaluate` takes it."""
    return type(kind.__name__, (kind,), attributes)
