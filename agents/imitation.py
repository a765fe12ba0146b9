"""Imitation learning: a policy learns a teacher's plans before it learns from rewards.

A plan says which level each item has, not in which order they were lowered. In a state on the
way there, each remaining step is therefore a right action, and the policy is trained to
choose one of them. States are random plans between the native one and the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.dqn.policies import DQNPolicy

from agents.algorithms import AgentConfigError
from agents.networks import action_scores, as_tensors
from agents.trained_policy import PlanObserver
from rap_env.ladder.observation import ObservationEncoder
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.request import Request

_WAYS = 512  # least number of random ways that are walked at once
_LEARNING_RATE, _LAST_SHARE = 3e-3, 0.05  # Adam's first learning rate, and what is left at the end
_MARGIN = 0.8  # that other actions' Q values should be lower, in normalised rewards, as in DQfD
_REPORTED_UPDATES = 20


class Demonstration(NamedTuple):
    """A teacher's plan for a request."""

    request: Request
    plan: Plan


class Batch(NamedTuple):
    """A batch of B states on the way to a teacher's plans, with A actions.

    Attributes:
        right: The actions that the teacher would take next, (B, A).
        valid: The actions that change something, (B, A).
    """

    seen: dict[str, torch.Tensor]
    right: torch.Tensor
    valid: torch.Tensor


def teacher_states(
    shown: Sequence[Demonstration], encoder: ObservationEncoder, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Sample states on the way to a teacher's plans, all numbers of steps equally likely.

    Args:
        shown: n demonstrations; those whose plan takes no step are never sampled.
        encoder: Encodes the observations of the model.
        batch_size: States in a batch, B.
        seed: Seed of the sampling.

    Yields:
        Batches, without end. Their states are from random ways, walked for many batches at once.

    Raises:
        AgentConfigError: No plan takes a step.
    """
    nothing = AgentConfigError(
        f"Nothing to imitate: none of {len(shown)} demonstrations lowers "
        "anything. Give requests whose budgets are below the native peak."
    )
    if not shown:
        raise nothing
    rng = np.random.default_rng(seed)
    observer = PlanObserver(encoder, [each.request for each in shown])
    targets = np.array([encoder.ladder.positions(each.plan) for each in shown])
    while True:
        which = np.resize(rng.permutation(len(shown)), max(_WAYS, len(shown)))
        ways, positions, right = observer.ways(which, targets[which], rng)
        if not len(ways):
            raise nothing
        share = 1 / np.bincount(ways)[ways]  # a long way is no more likely than a short one
        size = -(-len(ways) // batch_size), batch_size
        for chosen in rng.choice(len(ways), size, p=share / share.sum()):
            seen = as_tensors(observer.observe(which[ways[chosen]], positions[chosen]))
            yield Batch(seen, torch.from_numpy(right[chosen]), seen["action_mask"] > 0)


def imitate(
    model: BaseAlgorithm,
    shown: Sequence[Demonstration],
    encoder: ObservationEncoder,
    *,
    updates: int,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train a model's policy to choose the plans that a teacher chooses.

    Actor-critic policies: behaviour cloning, with minus the log of the probability that the
    next action is one of the right ones. Q networks: the large-margin loss of DQfD (Hester et
    al. 2018, arXiv 1704.03732, section "Deep Q-learning from demonstrations") between the
    best right action and the best of all. No values are learned: the returns of a teacher's
    plans are not known.

    Args:
        model: A model of any agent, trained or not; its policy is changed.
        shown: The teacher's plans; those without any step are ignored.
        encoder: Encodes the observations of the model that they are for.
        updates: Updates of the network.
        batch_size: States in each update.
        seed: Seed of the states.
        progress: Show a progress bar on a terminal.

    Returns:
        The share of states of the last updates in which the policy's greedy action is one of
        the teacher's.

    Raises:
        AgentConfigError: No demonstration lowers anything.
        InvalidRequestError: The model cannot serve a request.
        UnknownNameError: It lacks levels of a plan.
    """
    policy: Any = model.policy
    states = teacher_states(shown, encoder, batch_size, seed)
    policy.set_training_mode(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=_LEARNING_RATE)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_SHARE, updates)
    agreements = []
    for _ in progress_bar(progress, range(updates), desc="imitate"):
        loss, agreement = _loss(policy, next(states))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        agreements.append(agreement)
    if isinstance(policy, DQNPolicy):
        policy.q_net_target.load_state_dict(policy.q_net.state_dict())
    policy.set_training_mode(False)
    return float(np.mean(agreements[-_REPORTED_UPDATES:]))


def _loss(policy: Any, batch: Batch) -> tuple[torch.Tensor, float]:
    scores = action_scores(policy, batch.seen)
    greedy = scores.detach().masked_fill(~batch.valid, -torch.inf).argmax(dim=1, keepdim=True)
    agreement = float(batch.right.gather(1, greedy).float().mean())
    right = scores.masked_fill(~batch.right, -torch.inf)
    if isinstance(policy, DQNPolicy):  # DQfD's J_E, the best right action being the expert's
        best = (scores + _MARGIN * ~batch.right).amax(dim=1)
        return (best - right.amax(dim=1)).mean(), agreement
    if isinstance(policy, MaskableActorCriticPolicy):
        scores = scores.masked_fill(~batch.valid, -torch.inf)
    return (scores.logsumexp(dim=1) - right.logsumexp(dim=1)).mean(), agreement
