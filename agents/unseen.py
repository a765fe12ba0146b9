"""Policies for models that were never run: searched plans, imitation of them, and policy gradients.

Models with equally many items are a group, whose plans a network sees at once and without
padding. Shapes: n plans, N items, F features of each, R entries of the request, H hidden width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
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
from rap_env.ladder.features import BYTES_OVER, COST_CEILING, COST_FLOOR, EveryLevel
from rap_env.ladder.items import KINDS, Counts
from rap_env.ladder.observation import Observation, ObservationEncoder
from rap_env.plan import Plan
from rap_env.policies.method import Basis, CountingScorer, Method
from rap_env.request import Request
from rap_env.workload.sampler import GridSampler

Floats = npt.NDArray[np.float64]
Play = Generator[tuple[Observation, Counts, Counts], Counts, Counts]
"""Yields the observation of m plans, their numbers and their positions; it is sent the items that
they lower, (m,), and returns the final positions of all plans, (n, N)."""

LOSS_OFFSET = 0.05
"""Added to losses before their logarithm is taken, nats per token."""

_FREED, _COST = (EveryLevel.features.index(name) for name in ("freed_share", "one_shot_cost"))
_COST_SCALE = float(np.log1p(COST_CEILING / COST_FLOOR))
_USEFUL_FLOOR = 1e-4
_MOST_RAISED = 3  # items of one mutation


class Bench:
    """A model with some requests: plays plans as arrays, measures them, and remembers all.

    Args:
        encoder: Encodes observations of the model, with the columns of `EveryLevel`.
        requests: The requests; plans name them by number.
        losses_of: Gives the losses of plans, nats per token: measures or predicts them.

    Attributes:
        ladder: The items.
        requests: The requests.
        count: Number of requests.
        observer: Observes plans.
        known: All plans whose losses were asked for, (known, N).
        losses: Their losses, (known,).
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        requests: Sequence[Request],
        losses_of: Callable[[Counts], Floats],
    ) -> None:
        self.ladder, self.requests, self.count = encoder.ladder, requests, len(requests)
        self.observer, self._losses_of = PlanObserver(encoder, requests), losses_of
        self.known, self.losses = self.observer.start(0), np.zeros(0)
        self._numbers: dict[bytes, int] = {}

    @classmethod
    def of(cls, env: PruningEnv) -> Self:
        """A model with the requests of its episodes, which its workload lists; plans are run."""
        scorer, ladder = env.context.scorer, env.ladder

        def run(positions: Counts) -> Floats:
            plans = [ladder.plan(row) for row in positions.tolist()]
            return np.array(scorer.nll_many(plans)) - scorer.dense_nll

        return cls(env.encoder, cast(GridSampler, env.sampler).requests, run)

    def played(self, which: Counts, start: Counts | None = None) -> Play:
        """Lower items until each plan fits its request: a generator for `play_together`."""
        positions = self.observer.start(len(which)) if start is None else start.copy()
        while len(active := np.flatnonzero(self.observer.over_bytes(which, positions))):
            of, now = which[active], positions[active]
            items = yield self.observer.observe(of, now), active, now
            positions[active] = self.observer.act(of, now, items)
        return positions

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
        play, items = self.played(which, start), None
        while True:
            try:
                seen, active, positions = play.send(items)  # type: ignore[arg-type]
            except StopIteration as end:
                return np.asarray(end.value)
            own = np.take_along_axis(extra[active], positions[..., None], axis=2)[..., 0]
            prices = own + weight * log_prices(seen["ladder"], seen["request"], np)
            items = np.where(seen["action_mask"] > 0, prices, np.inf).argmin(axis=1)

    def mutated(self, which: Counts, positions: Counts, rng: np.random.Generator) -> Counts:
        """Plans near others: some items are raised, then all are lowered until they fit again."""
        raised = positions.copy()
        for row in raised:
            lowered = np.flatnonzero(row)
            some = rng.choice(lowered, min(len(lowered), rng.integers(1, _MOST_RAISED + 1)), False)
            row[some] = rng.integers(0, row[some])
        return self.noisy(which, rng, raised)

    def best(self, which: Counts, most: int = 1) -> Counts:
        """The known plans that fit requests and lose least, (n, N): one of the best `most`."""
        order, fitting = np.argsort(self.losses), dict[int, Counts]()
        for request in set(which.tolist()):
            over = self.observer.over_bytes(np.full(len(order), request), self.known[order])
            fitting[request] = order[over == 0][:most]
        pairs = enumerate(which.tolist())
        return self.known[[fitting[r][number % len(fitting[r])] for number, r in pairs]]

    def search(self, rng: np.random.Generator, noisy: int, rounds: int, offspring: int) -> None:
        """Measure noisy orders for each request, then mutations of the best known plans."""
        every = np.arange(self.count)
        self.measure(self.noisy(every.repeat(noisy), rng))
        for _ in range(rounds):
            which = every.repeat(offspring)
            self.measure(self.mutated(which, self.best(which, most=3), rng))


def log_prices(rows: Any, request: Any, of: Any) -> Any:
    """Logs of the cost of each item's next level per useful byte, (n, N).

    Args:
        rows: Rows of items, (n, N, F).
        request: Requests, (n, R).
        of: ``numpy`` or ``torch``, whose arrays they are.
    """
    useful = of.minimum(rows[..., _FREED], request[:, [BYTES_OVER]] + _USEFUL_FLOOR)
    return rows[..., _COST] * _COST_SCALE - of.log(useful + _USEFUL_FLOOR)


def play_together(
    benches: Sequence[Bench],
    which: Sequence[Counts],
    choose: Callable[[dict[str, torch.Tensor], Counts], Counts],
) -> list[Counts]:
    """Play plans on several models; a network sees those of a group of models at once.

    Args:
        benches: The models.
        which: The requests of the plans of each.
        choose: Gives the items that plans lower, (m,), for their observation and their numbers
            among all plans of all models.

    Returns:
        The final positions of the plans of each model.
    """
    first = np.cumsum([0, *map(len, which)])
    plays = [bench.played(own) for bench, own in zip(benches, which, strict=True)]
    waiting = {number: next(play) for number, play in enumerate(plays)}
    ended: dict[int, Counts] = {}
    while waiting:
        groups: dict[int, list[int]] = {}
        for number in waiting:
            groups.setdefault(len(benches[number].ladder), []).append(number)
        for group in groups.values():
            seen = [waiting[number][0] for number in group]
            owners = [first[number] + waiting[number][1] for number in group]
            joined = {k: np.concatenate([each[k] for each in seen]) for k in seen[0]}
            items = choose(tensors(joined), np.concatenate(owners))
            parts = np.split(items, np.cumsum([*map(len, owners)])[:-1])
            for number, own in zip(group, parts, strict=True):
                try:
                    waiting[number] = plays[number].send(own)
                except StopIteration as end:
                    ended[number] = end.value
                    del waiting[number]
    return [ended[number] for number in range(len(benches))]


class SetNetwork(nn.Module):
    """Attention between the items of a plan; a number for each item, and one for the plan.

    Args:
        features: F.
        request: R.
        width: H.
        blocks: Blocks of attention.
    """

    def __init__(self, features: int, request: int, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(features + request + 2, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.scores, self.whole = nn.Linear(width, 1), nn.Linear(width, 1)
        for last in (self.scores, self.whole):
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)

    def forward(self, seen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Map observations to logits of items, (n, N), and a number for each plan, (n,)."""
        rows, request = seen["ladder"], seen["request"]
        valid = seen["action_mask"] > 0
        prices = log_prices(rows, request, torch) * valid
        count = valid.sum(dim=1, keepdim=True).clamp(min=1)
        centred = (prices - prices.sum(dim=1, keepdim=True) / count) * valid
        spread = (centred.square().sum(dim=1, keepdim=True) / count + 1e-4).sqrt()
        ranks = (centred / spread).clamp(-3, 3)
        shared = request[:, None].expand(-1, rows.shape[1], -1)
        hidden = self.enter(torch.cat([rows, shared, ranks[..., None], valid[..., None]], dim=2))
        hidden = self.blocks(hidden)
        logits = self.scores(hidden).squeeze(2).masked_fill(~valid, -torch.inf)
        return logits, self.whole(hidden.mean(dim=1)).squeeze(1)


def tensors(observation: Observation) -> dict[str, torch.Tensor]:
    """An observation as float32 tensors, without rows that only fill it up."""
    seen = {k: torch.as_tensor(np.asarray(v, dtype=np.float32)) for k, v in observation.items()}
    count = int(seen["ladder"][..., : len(KINDS)].any(dim=2).sum(dim=1).max())
    return {k: v if k == "request" else v[:, :count] for k, v in seen.items()}


def greedy(network: SetNetwork, seen: dict[str, torch.Tensor], _plans: Counts) -> Counts:
    """The most likely items, (m,)."""
    with torch.no_grad():
        return network(seen)[0].argmax(dim=1).numpy()


def sample(
    network: SetNetwork, rng: np.random.Generator, seen: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random items and the logs of their probabilities, (m,) each."""
    with torch.no_grad():
        logs = network(seen)[0].log_softmax(1)
    noise = torch.from_numpy(rng.gumbel(size=logs.shape)).float()
    items = (logs + noise).argmax(1, keepdim=True)
    return items[:, 0], logs.gather(1, items)[:, 0]


def sampled(
    network: SetNetwork, rng: np.random.Generator, seen: dict[str, torch.Tensor], _plans: Counts
) -> Counts:
    """Random items, (m,)."""
    return np.asarray(sample(network, rng, seen)[0])


def acting(network: SetNetwork) -> Callable[[Observation], int]:
    """What a network does at one observation, as `rap_env.evaluate` asks."""

    def act(observation: Observation) -> int:
        seen = tensors({k: v[None] for k, v in observation.items()})
        return int(greedy(network, seen, np.zeros(1, np.int64))[0])

    return act


Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Observations of a group, and what a network shall say of them."""


def fit(
    network: SetNetwork,
    groups: Sequence[Batch],
    loss: Callable[[SetNetwork, dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    updates: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train a network on batches of one group at a time, each as often as it has observations."""
    rng = np.random.default_rng(seed)
    sizes = np.array([len(target) for _, target in groups])
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates, pct_start=0.1)
    for number in rng.choice(len(groups), updates, p=sizes / sizes.sum()):
        seen, target = groups[number]
        rows = torch.from_numpy(rng.integers(len(target), size=batch_size))
        value = loss(network, {k: v[rows] for k, v in seen.items()}, target[rows])
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()


def imitation_loss(
    network: SetNetwork, seen: dict[str, torch.Tensor], right: torch.Tensor
) -> torch.Tensor:
    """Minus the log of the probability that the next item is a right one, (n, N)."""
    logits, _ = network(seen)
    return (logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


def prediction_loss(
    network: SetNetwork, seen: dict[str, torch.Tensor], log_loss: torch.Tensor
) -> torch.Tensor:
    """Squared error of the predicted logs of losses, (n,)."""
    return functional.mse_loss(network(seen)[1], log_loss)


def teacher_states(benches: Sequence[Bench], ways: int, most: int, seed: int) -> list[Batch]:
    """States on random ways to the best known plans of each request, with the right items."""
    rng, groups = np.random.default_rng(seed), dict[int, list[Batch]]()
    for bench in benches:
        which = np.arange(bench.count * ways) // ways
        of, positions, right = bench.observer.ways(which, bench.best(which, most), rng)
        seen = tensors(bench.observer.observe(which[of], positions.astype(np.int64)))
        groups.setdefault(len(bench.ladder), []).append((seen, torch.from_numpy(right)))
    return [*map(_joined, groups.values())]


def measured_plans(benches: Sequence[Bench]) -> list[Batch]:
    """All known plans without their requests, with the logs of their losses."""
    groups = dict[int, list[Batch]]()
    for bench in benches:
        seen = plan_observations(bench.observer, bench.known)
        logs = np.log(np.clip(bench.losses, 0, None) + LOSS_OFFSET)
        groups.setdefault(len(bench.ladder), []).append((seen, torch.tensor(logs).float()))
    return [*map(_joined, groups.values())]


def plan_observations(observer: PlanObserver, positions: Counts) -> dict[str, torch.Tensor]:
    """Observations of plans without a request."""
    seen = tensors(observer.observe(np.zeros(len(positions), np.int64), positions))
    return {**seen, "request": torch.zeros_like(seen["request"])}


def _joined(batches: Sequence[Batch]) -> Batch:
    seen = {k: torch.cat([each[k] for each, _ in batches]) for k in batches[0][0]}
    return seen, torch.cat([target for _, target in batches])


CLIP, EPOCHS, MINIBATCH, ENTROPY = 0.2, 2, 2048, 0.003
REQUESTS_AT_ONCE, SAMPLES = 2, 8
"""Requests of each model in a rollout, and plans of each request, which are compared."""


def improve(
    network: SetNetwork,
    benches: Sequence[Bench],
    updates: int,
    learning_rate: float,
    seed: int,
    note: Callable[[int, float], object] = lambda update, mean: None,
) -> None:
    """Masked PPO on whole plans: each plan is compared with others for the same request.

    The reward of a plan is minus the logarithm of its loss. Its advantage, the difference from
    the mean of the plans for the request, replaces a critic, because only whole plans are paid.

    Args:
        network: The policy; it is changed.
        benches: The models.
        updates: Rollouts, of `REQUESTS_AT_ONCE` times `SAMPLES` plans of each model.
        learning_rate: Adam's first learning rate; it falls linearly to 0.
        seed: Seed of requests and actions.
        note: Called after each rollout with its number and the mean reward.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, eps=1e-5)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        which = [
            rng.choice(bench.count, REQUESTS_AT_ONCE, False).repeat(SAMPLES) for bench in benches
        ]
        visited: dict[int, list[tuple[dict[str, torch.Tensor], torch.Tensor, Counts]]] = {}

        def choose(seen: dict[str, torch.Tensor], owners: Counts, visited: Any = visited) -> Counts:
            items, logs = sample(network, rng, seen)
            old = torch.stack([items, logs], dim=1)
            visited.setdefault(seen["ladder"].shape[1], []).append((seen, old, owners))
            return items.numpy()

        ends = play_together(benches, which, choose)
        losses = [bench.measure(end) for bench, end in zip(benches, ends, strict=True)]
        rewards = -np.log(np.clip(np.concatenate(losses), 0, None) + LOSS_OFFSET)
        compared = rewards.reshape(-1, SAMPLES)
        advantages = compared - compared.mean(axis=1, keepdims=True)
        advantages = torch.from_numpy(advantages.ravel() / (advantages.std() + 1e-6)).float()
        groups = []
        for parts in visited.values():
            seen, old = _joined([(each, chosen) for each, chosen, _ in parts])
            own = advantages[np.concatenate([owners for *_, owners in parts])]
            used = own.abs() > 1e-4  # where all plans of a request are equal, nothing is learned
            groups.append(({k: v[used] for k, v in seen.items()}, old[used], own[used]))
        _ppo_epochs(network, optimizer, groups, rng)
        note(update, float(rewards.mean()))


def _ppo_epochs(
    network: SetNetwork,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]],
    rng: np.random.Generator,
) -> None:
    """Update a policy on visited states of groups: observations, actions with logs, advantages."""
    total = sum(len(own) for *_, own in groups)
    parts = max(1, round(total / MINIBATCH))
    for _ in range(EPOCHS):
        orders = [np.array_split(rng.permutation(len(own)), parts) for *_, own in groups]
        for number in range(parts):
            optimizer.zero_grad()
            for (seen, old, own), order in zip(groups, orders, strict=True):
                rows = torch.from_numpy(order[number])
                if not len(rows):
                    continue
                logs = network({k: v[rows] for k, v in seen.items()})[0].log_softmax(1)
                chosen = logs.gather(1, old[rows, :1].long())[:, 0]
                ratio = (chosen - old[rows, 1]).exp()
                gain = own[rows]
                paid = torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
                entropy = -(logs.exp() * logs.clamp(min=-50)).sum(1)
                loss = -(paid + ENTROPY * entropy).sum() / (total / parts)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()


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
        def run(positions: Counts) -> Floats:
            return np.array(scores.nll_many([*map(self.ladder.plan, positions.tolist())]))

        bench = Bench(self._encoder, [request], run)
        plans = self._plans(bench, self.random(request))
        if self.max_evaluations > 1:
            bench.measure(plans[: self.max_evaluations])
            plans = bench.best(np.zeros(1, np.int64))
        return self.ladder.plan(plans[0].tolist())

    @abstractmethod
    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        """The plans, (n, N), the most promising one first."""

    @property
    def _requests(self) -> Counts:
        """The request once for each plan."""
        return np.zeros(self.max_evaluations, np.int64)


class NoisyOrders(Tries):
    """The order by cost per useful byte, and others with noise on the logs of the prices."""

    name = "noisy_orders"
    scale = 1.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        order = bench.noisy(self._requests[:1], rng, scale=0.0)
        return np.concatenate([order, bench.noisy(self._requests[1:], rng, scale=self.scale)])


class RandomOrders(NoisyOrders):
    """The same with noise that hides the prices, and without the order itself."""

    name = "random_orders"
    scale = 100.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        return bench.noisy(self._requests, rng, scale=self.scale)


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
        removal: Levels that a removal comes later, at most 0 (earlier).
    """

    name = "uniform"
    ffn, depth, removal = 0.0, -1, 0.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        layers = len(self.ladder)
        extra = np.zeros((1, layers, self.ladder.width))
        for number, item in enumerate(self.ladder.items):
            place = self.depth * (item.layer or 0) + self.ffn * (item.kind == "ffn")
            extra[0, number] = np.arange(self.ladder.width) + place / layers
            if item.levels[-1] == "removed":
                extra[0, number, len(item.levels) - 2] += self.removal
        return bench.priced(self._requests[:1], extra, weight=0.0)


class Predicted(Tries):
    """A search on the losses that networks predict: regression on the plans of other models.

    Attributes:
        networks: They were trained with `prediction_loss`.
        pessimism: Standard deviations between networks that are added to their mean.
    """

    name = "predicted"
    networks: Sequence[SetNetwork] = ()
    pessimism = 1.0

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        def predict(positions: Counts) -> Floats:
            seen = plan_observations(bench.observer, positions)
            with torch.no_grad():
                logs = torch.stack([network(seen)[1] for network in self.networks]).numpy()
            return np.asarray(logs.mean(axis=0) + self.pessimism * logs.std(axis=0))

        of_networks = Bench(self._encoder, bench.requests, predict)
        of_networks.search(rng, noisy=64, rounds=8, offspring=32)
        over = of_networks.observer.over_bytes(
            np.zeros(len(of_networks.losses), np.int64), of_networks.known
        )
        return of_networks.known[np.argsort(np.where(over > 0, np.inf, of_networks.losses))]


class Acting(Tries):
    """A trained network: its most likely actions, then plans with random ones.

    Attributes:
        network: The network.
    """

    name = "acting"
    network: SetNetwork

    def _plans(self, bench: Bench, rng: np.random.Generator) -> Counts:
        first = play_together([bench], [self._requests[:1]], partial(greedy, self.network))
        if self.max_evaluations == 1:
            return first[0]
        draw = partial(sampled, self.network, rng)
        return np.concatenate(first + play_together([bench], [self._requests[1:]], draw))


def variant(kind: type[Tries], **attributes: Any) -> type[Tries]:
    """A method with other attributes, as `rap_env.evaluate` takes it."""
    return type(kind.__name__, (kind,), attributes)
