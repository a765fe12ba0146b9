"""Policies for models that were never run: searched plans, imitation of them, and policy gradients.

Models with equally many items are a group, whose plans a network sees at once and without
padding. Shapes: n plans, N items, F features of each, R entries of the request, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from agents.trained_policy import PlanObserver
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.ladder.features import BYTES_OVER, COST_CEILING, COST_FLOOR, EveryLevel
from rap_env.ladder.items import KINDS, Counts
from rap_env.ladder.observation import Observation
from rap_env.request import Request

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
        env: The environment of the model, with ``every_level=True``.
        requests: The requests; plans name them by number.
        predict: Predicts the losses of plans, (n, N) to (n,), in the place of the model.

    Attributes:
        name: Name of the model.
        observer: Observes plans.
        known: All plans that were measured, (known, N).
        losses: Their losses on the calibration text, nats per token, (known,).
    """

    def __init__(
        self,
        env: RAPLadderEnv,
        requests: Sequence[Request],
        predict: Callable[[Counts], Floats] | None = None,
    ) -> None:
        self.name, self.scorer, self.ladder = env.memory.facts.name, env.context.scorer, env.ladder
        self.observer, self.count = PlanObserver(env.encoder, requests), len(requests)
        self.known, self.losses = self.observer.start(0), np.zeros(0)
        self._numbers: dict[bytes, int] = {}
        self._predict = self._run if predict is None else predict

    def played(self, which: Counts, start: Counts | None = None) -> Play:
        """Lower items until each plan fits its request: a generator for `play_together`."""
        positions = self.observer.start(len(which)) if start is None else start.copy()
        while len(active := np.flatnonzero(self.observer.over_bytes(which, positions))):
            of, now = which[active], positions[active]
            items = yield self.observer.observe(of, now), active, now
            positions[active] = self.observer.act(of, now, items)
        return positions

    def measure(self, positions: Counts) -> Floats:
        """Losses of plans on the calibration text, nats per token, (n,)."""
        keys = [row.tobytes() for row in positions.astype(np.int8)]
        new = {k: row for k, row in zip(keys, positions, strict=True) if k not in self._numbers}
        if new:
            rows = np.stack([*new.values()])
            self._numbers |= {key: len(self.losses) + n for n, key in enumerate(new)}
            self.known = np.concatenate([self.known, rows])
            self.losses = np.concatenate([self.losses, self._predict(rows)])
        return self.losses[[self._numbers[key] for key in keys]]

    def _run(self, positions: Counts) -> Floats:
        plans = [self.ladder.plan(row) for row in positions.tolist()]
        return np.array(self.scorer.nll_many(plans)) - self.scorer.dense_nll

    def noisy(
        self, which: Counts, rng: np.random.Generator, start: Counts | None = None, scale: float = 1.0
    ) -> Counts:
        """Plans by cost per useful byte, each with other noise on the logs of all prices."""
        width = max(len(item.levels) for item in self.ladder.items) + 1
        noise = rng.normal(0, scale, (len(which), len(self.ladder), width))

        play, items = self.played(which, start), None
        while True:
            try:
                seen, active, positions = play.send(items)  # type: ignore[arg-type]
            except StopIteration as end:
                return end.value
            own = np.take_along_axis(noise[active], positions[..., None], axis=2)[..., 0]
            prices = log_prices(seen["ladder"], seen["request"], np) - own
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
        """The known plans that fit requests and lose least, (n, N); one of the first `most`."""
        order = np.argsort(self.losses)
        chosen = []
        for number, request in enumerate(which.tolist()):
            over = self.observer.over_bytes(np.full(len(order), request), self.known[order])
            chosen.append(order[np.flatnonzero(over == 0)[number % most]])
        return self.known[chosen]

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
