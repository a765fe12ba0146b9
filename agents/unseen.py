"""Policies for models that were never run: they correct the costs that a knapsack adds up.

A knapsack over measured costs of single levels ignores what levels cost together. A network with
attention between the items of a model, the actor, corrects the logarithm of each cost, for the
request. It learns on plans of other models that run: a plan becomes more likely if it loses less
than others for the request. A critic, which predicts the losses of plans, chooses among the
knapsacks over the corrected costs with noise. If plans may be run, a Gaussian process over what
the critic got wrong chooses the next ones.

Shapes: n plans or requests, N items, W levels, R requests of a model, C plans that a network
chooses among.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from agents.plan_searches import Bench, Floats, Searched, Tries
from rap_env.ladder.features import REQUEST_FEATURES, SHOWN_LEVELS, EveryLevel
from rap_env.ladder.items import Counts, Ladder

Tensors = dict[str, torch.Tensor]

LOSS_OFFSET = 0.05
"""Added to losses before their logarithm is taken, nats per token."""

_REMOVED_AT = 3  # the position of removal in the ladders that networks are trained on
_LEVELS = EveryLevel.features.index("cost1")
_INPUT_NOISE = 0.05  # while a network is trained, because models are few


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


def observed(bench: Bench, which: Counts, positions: Counts) -> Tensors:
    """What networks see of plans for requests of a model: float32, each level in its column."""
    arrays = bench.observer.observe(which, positions).items()
    seen = {name: torch.as_tensor(np.asarray(array, np.float32)) for name, array in arrays}
    rows = seen["ladder"]
    columns = rows[..., _LEVELS:].view(*rows.shape[:2], SHOWN_LEVELS, 2)
    rows[..., _LEVELS:] = columns[:, *_columns(bench.ladder)].flatten(2)
    return seen


def _columns(ladder: Ladder) -> tuple[Counts, Counts]:
    """The items, (N, 1), and the column of each of their levels, (N, SHOWN_LEVELS).

    Networks know removal as the third level below the native one. Where it is an earlier one, it
    changes places with the third one, which is not there.
    """
    columns, third = np.tile(np.arange(SHOWN_LEVELS), (len(ladder), 1)), _REMOVED_AT - 1
    for row, item in zip(columns, ladder.items, strict=True):
        if "removed" in item.levels[:_REMOVED_AT]:
            last = item.levels.index("removed") - 1
            row[[last, third]] = third, last
    return np.arange(len(ladder))[:, None], columns


def plan_observations(bench: Bench, positions: Counts) -> Tensors:
    """Observations of plans without a request."""
    seen = observed(bench, np.zeros(len(positions), np.int64), positions)
    return {**seen, "request": torch.zeros_like(seen["request"])}


def predicted_logs(networks: Sequence[SetNetwork], bench: Bench, positions: Counts) -> Floats:
    """Logs of losses that networks predict: their mean and one standard deviation, (n,)."""
    seen = plan_observations(bench, positions)
    with torch.no_grad():
        logs = torch.stack([network.eval()(seen)[1] for network in networks]).numpy()
    return np.asarray(logs.mean(axis=0) + logs.std(axis=0), dtype=np.float64)


def corrections(networks: Sequence[SetNetwork], bench: Bench, which: Counts) -> Floats:
    """What networks add on average to the logs of costs for requests of a model, (n, N, W)."""
    seen = observed(bench, which, bench.observer.start(len(which)))
    with torch.no_grad():
        means = torch.stack([network.eval()(seen)[0] for network in networks]).mean(dim=0)
    own = means[:, *_columns(bench.ladder)][..., : bench.log_costs.shape[1]]
    return np.asarray(own, dtype=np.float64)


def noisy_log_costs(bench: Bench, means: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Logs of corrected costs, each time with other noise but for the first time.

    Args:
        bench: The model.
        means: The corrections for some requests, (n, N, W).
        count: How often.
        rng: Draws the noise.

    Returns:
        (count, n, N, W).
    """
    noise = rng.normal(0, _NOISE, (count, *means.shape))
    noise[0] = 0
    return np.asarray(bench.log_costs + means + noise)


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
    """
    networks, rng = new_networks(count, seed), np.random.default_rng(seed)
    for _ in range(rounds):
        for bench in benches:
            for network in networks:
                means = corrections([network], bench, bench.every)
                costs = noisy_log_costs(bench, means, _TRIED, rng)
                for request in bench.every.tolist():
                    bench.measure(bench.knapsack(request, costs[:, request]))
        choices = [_choices(bench, rng) for bench in benches]
        for network in networks:
            fit(network, partial(_expected_loss, choices), updates, rng)
    return networks


_BATCH, _MODELS_AT_ONCE, _TRIED = 256, 4, 3
_NOISE, _TEMPERATURE, _DECAY = 0.3, 0.1, 0.02
"""Noise of the logs of costs; of the choice among plans; and of corrections towards 0."""
_BEST, _OTHERS = 64, 192
"""Known plans of a request that a network chooses among: the best ones, and others."""
_LEARNING_RATE = 3e-3

Choices = tuple[Tensors, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a model: the observations of all requests, (R, ...); some known plans that fit each, (R, C,
N); the logs of their losses, (R, C); and the logs of the costs of levels, (N, W)."""


def _choices(bench: Bench, rng: np.random.Generator) -> Choices:
    rows = []
    for fitting in map(bench.fitting, bench.every.tolist()):
        others = rng.permutation(fitting[_BEST:])[:_OTHERS]
        rows.append(np.resize(np.concatenate([fitting[:_BEST], others]), _BEST + _OTHERS))
    chosen = np.stack(rows)
    seen = observed(bench, bench.every, bench.observer.start(len(bench.every)))
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


class Predicted(Searched):
    """A search on the losses that networks predict: regression on the plans of other models.

    Attributes:
        critics: As of `predictors`.
    """

    name = "predicted"
    critics: Sequence[SetNetwork] = ()

    def _predicted(self, bench: Bench, positions: Counts) -> Floats:
        return predicted_logs(self.critics, bench, positions)


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
        means = corrections(self.actors, bench, bench.every)
        log_costs = noisy_log_costs(bench, means, count, rng)[:, 0]
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
