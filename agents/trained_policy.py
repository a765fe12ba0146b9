"""A trained policy at decision time: from a request to a plan by passes of a small network.

It observes batches of plans on their way from the native plan to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy

from agents.algorithms import AgentConfigError
from agents.checkpoint import Checkpoint, checkpoint_of
from agents.networks import action_scores, as_tensors
from rap_env.context.base import make_encoder
from rap_env.errors import ArtifactError
from rap_env.ladder.features import BYTES_OVER, bytes_over
from rap_env.ladder.items import Counts
from rap_env.ladder.observation import Observation, ObservationEncoder
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext, Scorer


Flags = npt.NDArray[np.bool_]


class PlanObserver:
    """Observes batches of n plans under some requests, on a model whose ladder has N items.

    A plan is given by the positions of its levels, see
    `rap_env.ladder.items.Ladder.positions`.

    Args:
        encoder: Encodes the observations.
        requests: The requests; the methods refer to them by index.

    Raises:
        InvalidRequestError: The model cannot serve a request.
    """

    def __init__(self, encoder: ObservationEncoder, requests: Sequence[Request]) -> None:
        for request in requests:
            encoder.memory.check(request.batch_size, request.seq_len_tokens)
        shapes = np.array([(r.batch_size, r.seq_len_tokens) for r in requests]).T
        self._encoder, self.ladder = encoder, encoder.ladder
        self._costs = encoder.ladder_bytes.stacked(*shapes)
        self._budget_bytes = np.array([request.budget_bytes for request in requests])
        self._requests = encoder.request(self._costs, self._budget_bytes)
        self._lengths = np.array([len(item.levels) for item in self.ladder.items])
        self._caches = np.array(self.ladder.caches, dtype=np.int64)

    def start(self, count: int) -> Counts:
        """The positions of `count` native plans, (count, N)."""
        return np.zeros((count, len(self.ladder)), dtype=np.int64)

    def over_bytes(self, which: Counts, positions: Counts) -> Counts:
        """Bytes above the budget, 0 where the request fits.

        Args:
            which: Index of each plan's request, (n,).
            positions: The positions of each plan's levels, (n, N).

        Returns:
            Bytes, (n,).
        """
        peaks = self._costs.peaks(positions, which)
        return np.asarray(np.maximum(0, peaks - self._budget_bytes[which]))

    def observe(self, which: Counts, positions: Counts) -> Observation:
        """The observations of plans; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``ladder`` (n, N, F) and ``action_mask`` (n, N), all float32.
        """
        peaks = self._costs.peaks(positions, which)
        native_peaks = self._costs.native_peak_bytes[which]
        request = self._requests[which]
        request[:, BYTES_OVER] = bytes_over(peaks, self._budget_bytes[which], native_peaks)
        rows, valid = self._encoder.encode_plans(self._costs, positions, which)
        mask = valid.astype(np.float32)
        return {"request": request, self._encoder.key: rows, "action_mask": mask}

    def act(self, which: Counts, positions: Counts, items: Counts) -> Counts:
        """The positions after items, (n,), and all that are taken with them, were lowered."""
        return self._costs.lowered(positions, items, which)

    def right_actions(self, which: Counts, positions: Counts, targets: Counts) -> Flags:
        """The items that a plan on the way to a target may lower next, (n, N).

        These are the items whose next level is not below their target. Levels that caches
        take together are right as soon as one of them needs them. The cache of a block that
        the target removes is lowered only together with others.

        Args:
            which: Index of each plan's request, (n,).
            positions: The positions of each plan's levels, (n, N).
            targets: Those of the target's levels, (n, N).
        """
        costs = self._costs
        lower = costs.nexts(positions, which)
        # A cache that goes with its block is past its last level.
        stays = targets < self._lengths
        right = (lower >= 0) & (lower <= targets) & stays
        for shared in self.ladder.shared_positions:
            takes = lower[:, self._caches] == shared
            needed = (right[:, self._caches] & takes).any(axis=1, keepdims=True)
            right[:, self._caches] |= takes & needed
        return right

    def ways(
        self, which: Counts, targets: Counts, rng: np.random.Generator
    ) -> tuple[Counts, Counts, Flags]:
        """Lower native plans by random right actions, until none is left.

        Args:
            which: Index of each target's request, (n,).
            targets: The positions of its levels, (n, N).
            rng: Source of randomness.

        Returns:
            Of all states in which an action was taken, step by step: the number of the target,
            (states,), the positions, int8, and the right actions there, (states, N) each.
        """
        numbers, at, states = np.arange(len(which)), self.start(len(which)), []
        while True:
            right = self.right_actions(which[numbers], at, targets[numbers])
            goes = right.any(axis=1)
            numbers, at, right = numbers[goes], at[goes], right[goes]
            states.append((numbers, at.astype(np.int8), right))
            if not len(numbers):
                return tuple(map(np.concatenate, zip(*states, strict=True)))  # type: ignore[return-value]
            chosen = np.where(right, rng.random(right.shape), -1.0).argmax(axis=1)
            at = self.act(which[numbers], at, chosen)


ScorePlans = Callable[[Sequence[Any]], Sequence[float]]
"""Returns a number for each plan, lower is better: its delta_nll or its NLL."""

_Q_TEMPERATURE = 0.25
"""Temperature of sampling by Q values, in units of their spread over an observation's
blocks."""


class TrainedPolicy(Policy):
    """Chooses plans with a trained network of any agent.

    It repeatedly takes the action with the highest logit until the request fits: it removes a
    block or lowers an item. Invalid actions are never considered, also for agents that
    were trained without action masks. With `best_of` above 1 it also samples from the
    network, all samples in parallel, and returns the plan with the lowest score.

    Args:
        policy: The network.
        encoder: Encodes its observations.
        best_of: Number of plans among which it chooses: the greedy one and samples.
        score_plans: Predicts scores of plans; if `best_of` is above 1, this or `scorer`
            is needed.
        scorer: Measures scores instead, if there is no `score_plans`; each plan then
            counts in `evaluations`.
        seed: Seed of the samples; the same request always gets the same samples.

    Attributes:
        evaluations: Plans whose measured scores all choices so far needed, stored
            scores included.

    Raises:
        AgentConfigError: `best_of` is below 1, or above 1 without anything that scores them.
    """

    name = "rap"

    def __init__(
        self,
        policy: BasePolicy,
        encoder: ObservationEncoder,
        *,
        best_of: int = 1,
        score_plans: ScorePlans | None = None,
        scorer: Scorer | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(best_of, bool) or not isinstance(best_of, int) or best_of < 1:
            raise AgentConfigError(
                f"best_of must be a whole number of at least 1, not {best_of!r}."
            )
        if best_of > 1 and score_plans is None and scorer is None:
            raise AgentConfigError(
                f"best_of={best_of} needs a way to score plans; pass score_plans (predictions) "
                "or scorer (measurements)."
            )
        self._policy = policy
        self._policy.set_training_mode(False)
        self._encoder = encoder
        self.weight_levels = encoder.ladder.weight_levels
        self._best_of = best_of
        self._score_plans = score_plans
        self._scorer = scorer
        self._seed = seed
        self.evaluations = 0

    @classmethod
    def load(cls, run_dir: str | Path, context: PruningContext, **options: Any) -> TrainedPolicy:
        """Load the policy of the newest checkpoint in a run's folder.

        A policy over levels is loaded with the ladder that it was trained on. A block-wise
        policy also serves a model with another number of layers, unless its blocks or items
        have learned vectors. `options` are further arguments of the class.

        Raises:
            ArtifactError: There is no checkpoint, it is damaged, or the policy was trained on
                a model of another shape.
            AgentConfigError: As for the class.
        """
        checkpoint = checkpoint_of(run_dir)
        encoder = make_encoder(context, **checkpoint.observed)
        return cls(fitting_policy(checkpoint, encoder), encoder, **options)

    def choose(self, request: Request) -> Plan:
        """Return the blocks to remove, or the levels of items, for a request.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
            InfeasibleBudgetError: No plan of the ladder fits the budget.
        """
        self._encoder.ladder_bytes.check_feasible(request)
        plans = list(dict.fromkeys(self.sample(request, self._best_of)))
        if len(plans) == 1:
            return plans[0]
        score = self._score_plans
        if score is None:
            assert self._scorer is not None  # checked by __init__
            score = self._scorer.nll_many
            self.evaluations += len(plans)
        scores = np.nan_to_num(np.asarray(score(plans), dtype=np.float64), nan=np.inf)
        return plans[int(np.argmin(scores))]

    @torch.inference_mode()
    def sample(self, request: Request, count: int) -> list[Plan]:
        """Return plans that fit `request`: the greedy one, then `count` - 1 samples.

        All of them grow in parallel, by one action in each pass of the network.
        """
        observer = PlanObserver(self._encoder, [request])
        state, which = observer.start(count), np.zeros(count, dtype=np.int64)
        generator = torch.Generator().manual_seed(self._seed)
        grows = np.flatnonzero(observer.over_bytes(which, state))
        while len(grows):
            seen = as_tensors(observer.observe(which[grows], state[grows]))
            logits = self._logits(seen)
            noise = torch.rand((count, logits.shape[1]), generator=generator)
            gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))  # argmax = a sample
            gumbel[0] = 0.0
            chosen = (logits + gumbel[torch.from_numpy(grows)]).argmax(dim=1)
            state[grows] = observer.act(which[grows], state[grows], chosen.numpy())
            grows = grows[observer.over_bytes(which[grows], state[grows]) > 0]
        return [observer.ladder.plan(row) for row in state.tolist()]

    def _logits(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the next action, minus infinity for invalid ones, (B, N)."""
        scores = action_scores(self._policy, observation)
        valid = observation["action_mask"] > 0
        if isinstance(self._policy, DQNPolicy):  # Q values have no scale of their own
            count = valid.sum(dim=1, keepdim=True)
            centred = scores - (scores * valid).sum(dim=1, keepdim=True) / count
            spread = (centred.square() * valid).sum(dim=1, keepdim=True).div(count).sqrt()
            scores = centred / (_Q_TEMPERATURE * spread + 1e-8)
        return scores.masked_fill(~valid, -torch.inf)


def fitting_policy(checkpoint: Checkpoint, encoder: ObservationEncoder) -> BasePolicy:
    """Return the checkpoint's network, rebuilt for the model's spaces if they differ.

    Raises:
        ArtifactError: It does not serve a model of this shape.
    """
    policy: BasePolicy = checkpoint.load_model().policy
    space = cast(spaces.Dict, encoder.space)
    (count,) = cast(tuple[int], space["action_mask"].shape)
    if policy.observation_space == space:
        return policy
    arguments = policy._get_constructor_parameters()
    arguments["observation_space"] = space
    arguments["action_space"] = spaces.Discrete(count)
    other: BasePolicy = type(policy)(**arguments)
    try:
        other.load_state_dict(policy.state_dict())
    except RuntimeError:
        pass  # another set of features, or vectors of another number of items
    else:
        return other
    raise ArtifactError(
        f"The policy in {checkpoint.folder} was trained on a model of another shape: it sees "
        f"{policy.observation_space}, but this model gives {space}; train a policy for this model, "
        "or one with policy_settings.block_vectors=0, which serves any number of items."
    )
