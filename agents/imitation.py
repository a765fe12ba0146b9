"""Imitation learning: a policy learns a teacher's plans before it learns from rewards.

A mask says which blocks are removed, a plan which level each item has, not in which order. In a
state on the way there, each remaining step is therefore a right action, and the policy is trained
to choose one of them. States are random subsets of the teacher's masks, or random plans between
the native one and the teacher's; they are drawn again for each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.dqn.policies import DQNPolicy

from agents.observations import as_tensors
from agents.plan_observer import PlanObserver
from agents.sb3_policies import action_scores
from agents.settings import AgentConfigError
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import ObservationEncoder
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.request import Request

Floats = npt.NDArray[np.float64]

_LAST_LEARNING_RATE = 0.05  # as a share of the first
_REPORTED_UPDATES = 20


@dataclass(frozen=True)
class Demonstration:
    """A teacher's plan for a request.

    Attributes:
        plan: The blocks that the teacher removes, or the levels that it chooses.
        episode_return: Return of an episode that ends with this plan, if only the last step is
            rewarded: minus delta_nll (nats per token) with the reward ``perplexity``. None if
            it is unknown or if every step is rewarded.
    """

    request: Request
    plan: Plan
    episode_return: float | None = None


class Lesson(NamedTuple):
    """What a teacher shows on one model and text.

    Attributes:
        shown: The demonstrations.
        encoder: Encodes the observations there.
    """

    shown: Sequence[Demonstration]
    encoder: ObservationEncoder


class Batch(NamedTuple):
    """A batch of B states on the way to a teacher's plans, with A actions.

    Attributes:
        right: The actions that the teacher would take next, (B, A).
        valid: The actions that change something, (B, A).
        returns: Discounted return of the rest of the episode, NaN if unknown, (B,).
    """

    seen: dict[str, torch.Tensor]
    right: torch.Tensor
    valid: torch.Tensor
    returns: torch.Tensor


class TeacherStates:
    """Samples states on the way to a teacher's plans.

    Args:
        shown: n demonstrations; those whose plan takes no step are never sampled.
        encoder: Encodes the observations of the model.
        gamma: Discount factor.
        batch_size: States in a batch, B.
        seed: Seed of the sampling.

    Attributes:
        steps: Number of actions to each plan, (n,).
        returns: Return of each demonstration, NaN if unknown, (n,).

    Raises:
        AgentConfigError: No plan takes a step.
    """

    def __init__(
        self,
        shown: Sequence[Demonstration],
        encoder: ObservationEncoder,
        gamma: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.steps = np.zeros(0, dtype=np.int64)
        if shown:
            self._observer = PlanObserver(encoder, [one.request for one in shown])
            self._targets = np.stack([self._observer.position(one.plan) for one in shown])
            self.steps = self._observer.distance(np.arange(len(shown)), self._targets)
        if not self.steps.any():
            raise AgentConfigError(
                f"Nothing to imitate: none of {len(shown)} demonstrations lowers or removes "
                "anything. Give requests whose budgets are below the native peak."
            )
        self.returns = np.array([one.episode_return for one in shown], dtype=np.float64)
        self._sampled = np.flatnonzero(self.steps)
        self._rng = np.random.default_rng(seed)
        self._batch_size = batch_size
        self._gamma = gamma

    def draw(self) -> Batch:
        """Sample a batch of states before the end of a way, all numbers of steps equally likely."""
        which = self._sampled[self._rng.integers(len(self._sampled), size=self._batch_size)]
        done: Counts = self._rng.integers(self.steps[which])
        state, right = self._observer.walk(which, self._targets[which], done, self._rng)
        seen = as_tensors(self._observer.observe(which, state))
        returns = self.returns[which] * self._gamma ** (self.steps[which] - done - 1)
        return Batch(
            seen=seen,
            right=torch.from_numpy(right),
            valid=seen["action_mask"] > 0,
            returns=torch.from_numpy(returns.astype(np.float32)),
        )


@dataclass(frozen=True)
class ImitationConfig:
    """Settings of imitation learning.

    Attributes:
        updates: Updates of the network.
        batch_size: States in each update.
        learning_rate: Adam's first learning rate; it falls linearly to a twentieth.
        margin: Large-margin loss of DQfD: by how much the Q values of other actions should at
            least be lower, in units of the normalised reward (0.8 in DQfD).
        value_weight: Weight of the value loss relative to the action loss.
        seed: Seed of the states.

    Raises:
        AgentConfigError: A number is out of its range.
    """

    updates: int = 600
    batch_size: int = 256
    learning_rate: float = 3e-3
    margin: float = 0.8
    value_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"updates": 1, "batch_size": 1, "seed": 0, "margin": 0, "value_weight": 0}
        for key, low in {**least, "learning_rate": 1e-12}.items():
            if not getattr(self, key) >= low:
                raise AgentConfigError(
                    f"{key} of imitation must be at least {low:g}, not {getattr(self, key)!r}."
                )


class ImitationResult(NamedTuple):
    """Result of imitation learning, over the states of the last updates.

    Attributes:
        agreement: Share of states in which the policy's greedy action is one of the teacher's.
    """

    loss: float
    agreement: float


def imitate(
    model: BaseAlgorithm,
    lessons: Sequence[Lesson],
    config: ImitationConfig | None = None,
    *,
    progress: bool = True,
) -> ImitationResult:
    """Train a model's policy to choose the plans that a teacher chooses.

    Actor-critic policies: behaviour cloning, with minus the log of the probability that the next
    action is one of the right ones, and the squared value error where returns are known. Q
    networks: the large-margin loss of DQfD (Hester et al. 2018, arXiv 1704.03732, section "Deep
    Q-learning from demonstrations") between the best right action and the best of all, and the
    squared error of the right actions' Q values. Values are in the unit of the model's rewards:
    if its environments normalise rewards, the running statistics are updated with the teacher's
    episodes first, so that values and the first rewards have the same unit.

    Args:
        model: A model of any agent, trained or not; its policy is changed.
        lessons: The teacher's plans; those without any step are ignored. Each lesson has
            an equal share of every batch.
        config: Settings; None for the defaults.
        progress: Show a progress bar on a terminal.

    Raises:
        AgentConfigError: No demonstration of a lesson removes or lowers anything, or there are more
            lessons than states in a batch.
        InvalidRequestError: The model cannot serve a request.
        UnknownNameError: It lacks blocks of a mask, or levels of a plan.
    """
    config = config or ImitationConfig()
    policy: Any = model.policy
    gamma = float(cast(Any, model).gamma)
    if not 0 < len(lessons) <= config.batch_size:
        raise AgentConfigError(
            f"A batch of {config.batch_size} states cannot have a share of {len(lessons)} lessons; "
            "give at least one lesson, and a batch_size of imitation that is large enough."
        )
    share = config.batch_size // len(lessons)
    taught = [TeacherStates(*lesson, gamma, share, config.seed) for lesson in lessons]
    returns = _in_unit_of_rewards(
        model,
        np.concatenate([states.returns for states in taught]),
        np.concatenate([states.steps for states in taught]),
    )
    ends = np.cumsum([len(states.returns) for states in taught])[:-1]
    for states, own in zip(taught, np.split(returns, ends), strict=True):
        states.returns = own
    policy.set_training_mode(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_LEARNING_RATE, config.updates)
    reached = []
    for _ in progress_bar(progress, range(config.updates), desc="imitate"):
        batch = _joined([states.draw() for states in taught])
        loss, agreement = _loss(policy, batch, config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        reached.append((float(loss.detach()), agreement))
    if isinstance(policy, DQNPolicy):
        policy.q_net_target.load_state_dict(policy.q_net.state_dict())
    policy.set_training_mode(False)
    return ImitationResult(*np.mean(reached[-_REPORTED_UPDATES:], axis=0).tolist())


def _joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    seen = {key: torch.cat([one.seen[key] for one in batches]) for key in batches[0].seen}
    rest = (torch.cat(parts) for parts in zip(*(one[1:] for one in batches), strict=True))
    return Batch(seen, *rest)


def _loss(policy: Any, batch: Batch, config: ImitationConfig) -> tuple[torch.Tensor, float]:
    scores = action_scores(policy, batch.seen)
    greedy = scores.detach().masked_fill(~batch.valid, -torch.inf).argmax(dim=1, keepdim=True)
    agreement = float(batch.right.gather(1, greedy).float().mean())
    if isinstance(policy, DQNPolicy):
        return _q_loss(scores, batch, config), agreement
    if isinstance(policy, MaskableActorCriticPolicy):
        scores = scores.masked_fill(~batch.valid, -torch.inf)
    right = scores.masked_fill(~batch.right, -torch.inf)
    chosen = (scores.logsumexp(dim=1) - right.logsumexp(dim=1)).mean()
    values = cast(ActorCriticPolicy, policy).predict_values(batch.seen)
    return chosen + config.value_weight * _error(values, batch.returns), agreement


def _q_loss(values: torch.Tensor, batch: Batch, config: ImitationConfig) -> torch.Tensor:
    """DQfD's J_E, with the best right action as the expert's action, and the value error."""
    best_right = values.masked_fill(~batch.right, -torch.inf).amax(dim=1)
    best = (values + config.margin * ~batch.right).amax(dim=1)
    errors = _error(values, batch.returns, batch.right)
    return (best - best_right).mean() + config.value_weight * errors


def _error(
    values: torch.Tensor, returns: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of values (B, n) where the return (B,) is known; 0 if it never is."""
    known = ~returns.isnan().unsqueeze(1).expand_as(values)
    known = known if counted is None else known & counted
    errors = (values - returns.nan_to_num().unsqueeze(1)).square() * known
    return errors.sum() / known.sum().clamp(min=1)


def _in_unit_of_rewards(model: BaseAlgorithm, paid: Floats, steps: Counts) -> Floats:
    """Return a teacher's returns, NaN if unknown, in the unit of the model's rewards.

    `VecNormalize` divides rewards by the standard deviation of the running return over all steps,
    which is 0 before the last step of an episode. Its statistics are updated as if it had seen
    the teacher's episodes.
    """
    known = ~np.isnan(paid) & (steps > 0)
    normalize = model.get_vec_normalize_env()
    if normalize is None or not normalize.norm_reward or not known.any():
        return paid
    running = np.zeros(steps[known].sum())
    running[steps[known].cumsum() - 1] = paid[known]
    normalize.ret_rms.update(running)
    unit = np.sqrt(normalize.ret_rms.var + normalize.epsilon)
    return np.clip(paid / unit, -normalize.clip_reward, normalize.clip_reward)
