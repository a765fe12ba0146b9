"""Imitation: a policy learns masks that a teacher found, before it learns from rewards.

A mask says which blocks go, not in which order. So at a state on the way to it, any of its
blocks that are still there is right, and a policy is only asked for one of them. States are
random subsets of the teacher's masks, drawn anew for each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.dqn.policies import DQNPolicy
from tqdm import tqdm

from agents.demonstrations import Batch, Demonstration, Floats, TeacherStates
from agents.sb3_policies import action_scores
from agents.settings import AgentConfigError
from rap_env.observation import ObservationBuilder

__all__ = ["Demonstration", "ImitationConfig", "ImitationResult", "imitate"]

_LAST_LEARNING_RATE = 0.05  # as a share of the first
_REPORTED_UPDATES = 20


@dataclass(frozen=True)
class ImitationConfig:
    """How a policy imitates.

    Attributes:
        updates: Updates of the network.
        batch_size: States in each.
        learning_rate: Adam's first rate; it falls linearly to a twentieth.
        margin: By how much Q values of other blocks should at least be lower, in units of the
            normalised reward (0.8 in DQfD).
        value_weight: Weight of the error of values beside that of choices.
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
    """How well the teacher is imitated, over the states of the last updates.

    Attributes:
        loss: Mean loss of the updates.
        agreement: Share of states in which the favourite of the kept blocks is the teacher's.
    """

    loss: float
    agreement: float


def imitate(
    model: BaseAlgorithm,
    demonstrations: Sequence[Demonstration],
    builder: ObservationBuilder,
    config: ImitationConfig | None = None,
    *,
    progress: bool = True,
) -> ImitationResult:
    """Teach a model's policy to remove the blocks that a teacher removes.

    Policies with logits: minus the log of the probability that the next block is one of the
    right ones, and the squared error of values where returns are known. Q networks: the large
    margin loss of DQfD (Hester et al. 2018, arXiv 1704.03732, section "Deep Q-learning from
    demonstrations") between the best right block and the best of all, and the squared error of
    the right blocks' Q values. Values are in the unit of the model's rewards: where its
    environments normalise them, the running statistics take in the teacher's episodes first,
    so that the first rewards are seen in the unit in which values were learned.

    Args:
        model: A model of any agent, trained or not; its policy is changed.
        demonstrations: What the teacher does; those that remove nothing teach nothing.
        builder: Makes the observations of the model that is pruned.
        config: How long and how fast; None for the defaults.
        progress: Show a bar if there is a terminal.

    Returns:
        How well it went.

    Raises:
        AgentConfigError: No demonstration removes a block.
        InvalidRequestError: The pruned model cannot serve a request.
        UnknownNameError: It lacks blocks of a mask.
    """
    config = config or ImitationConfig()
    shown = [one for one in demonstrations if one.mask]
    if not shown:
        raise AgentConfigError("There is nothing to imitate: no demonstration removes a block.")
    policy: Any = model.policy
    gamma = float(cast(Any, model).gamma)
    states = TeacherStates(
        shown, builder, _returns(model, shown), gamma, config.batch_size, config.seed
    )
    policy.set_training_mode(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_LEARNING_RATE, config.updates)
    reached = []
    for _ in tqdm(range(config.updates), "imitate", disable=None if progress else True):
        batch = states.draw()
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


def _loss(policy: Any, batch: Batch, config: ImitationConfig) -> tuple[torch.Tensor, float]:
    scores = action_scores(policy, batch.seen)
    liked = scores.detach().masked_fill(~batch.kept, -torch.inf).argmax(dim=1, keepdim=True)
    agreement = float(batch.right.gather(1, liked).float().mean())
    if isinstance(policy, DQNPolicy):
        return _q_loss(scores, batch, config), agreement
    if isinstance(policy, MaskableActorCriticPolicy):
        scores = scores.masked_fill(~batch.kept, -torch.inf)
    right = scores.masked_fill(~batch.right, -torch.inf)
    chosen = (scores.logsumexp(dim=1) - right.logsumexp(dim=1)).mean()
    values = cast(ActorCriticPolicy, policy).predict_values(batch.seen)
    return chosen + config.value_weight * _error(values, batch.returns), agreement


def _q_loss(values: torch.Tensor, batch: Batch, config: ImitationConfig) -> torch.Tensor:
    """DQfD's J_E, with the best of the right blocks as the expert's, and the values' error."""
    best_right = values.masked_fill(~batch.right, -torch.inf).amax(dim=1)
    best = (values + config.margin * ~batch.right).amax(dim=1)
    errors = _error(values, batch.returns, batch.right)
    return (best - best_right).mean() + config.value_weight * errors


def _error(
    values: torch.Tensor, returns: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of values (B, n) where the return (B,) is known; 0 if nowhere."""
    known = ~returns.isnan().unsqueeze(1).expand_as(values)
    known = known if counted is None else known & counted
    errors = (values - returns.nan_to_num().unsqueeze(1)).square() * known
    return errors.sum() / known.sum().clamp(min=1)


def _returns(model: BaseAlgorithm, shown: Sequence[Demonstration]) -> Floats:
    """What the teacher's episodes are paid in the unit of the model's rewards, NaN if unknown.

    `VecNormalize` divides rewards by the deviation of the running return over all steps, which
    is 0 until an episode's last one; here it is told of the teacher's episodes as if it had
    seen them.
    """
    paid = np.array([one.episode_return for one in shown], dtype=np.float64)
    known = ~np.isnan(paid)
    normalize = model.get_vec_normalize_env()
    if normalize is None or not normalize.norm_reward or not known.any():
        return paid
    lengths = np.array([len(one.mask) for one in shown])[known]
    running = np.zeros(lengths.sum())
    running[lengths.cumsum() - 1] = paid[known]
    normalize.ret_rms.update(running)
    unit = np.sqrt(normalize.ret_rms.var + normalize.epsilon)
    return np.clip(paid / unit, -normalize.clip_reward, normalize.clip_reward)
