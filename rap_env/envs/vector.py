"""`RAPPrune-v0` many times in one process: lanes step together and are scored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rap_env.blocks import BlockMask
from rap_env.envs.lane_checks import (
    at_least_one,
    autoreset_mode_of,
    lane_actions,
    lane_flags,
    lane_seeds,
)
from rap_env.envs.lane_infos import final_infos, lane_infos
from rap_env.envs.lanes import Flags, Lanes
from rap_env.envs.parts import check_render_mode
from rap_env.envs.prune import RAPPruneEnv
from rap_env.envs.task import PruningTask
from rap_env.observation import Observation
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.request import Request

_EACH = {
    "mask": "masks",
    "request": "requests",
    "render": "render",
    "action_masks": "action_masks",
    "np_random": "np_random",
    "np_random_seed": "np_random_seed",
}
"""What differs from lane to lane: names of a single environment and of all lanes' values."""


class RAPPruneVectorEnv(gym.vector.VectorEnv[Observation, npt.NDArray[np.int64], Any]):
    """n environments of the kind of `rap_env.RAPPruneEnv`, stepped as arrays.

    The same seeds give the same episodes as n single environments under
    `gymnasium.vector.SyncVectorEnv` with the same `autoreset_mode`, infos included. The scores
    that a step misses are measured together, so that masks share what they have in common.

    Args:
        model: As for the single environment.
        num_envs: How many environments.
        autoreset_mode: When a lane whose episode is over begins the next one: ``"NextStep"``
            (its next step, whatever the action), ``"SameStep"`` (the step that ends it; infos hold
            ``final_obs`` and ``final_info``) or ``"Disabled"`` (at
            ``reset(options={"reset_mask": flags})``).
        max_episode_steps: Steps after which a lane is truncated, as by gymnasium's ``TimeLimit``:
            without a word to the reward.
        render_mode: As for the single environment.
        settings: As for the single environment.

    Attributes:
        context: The model with its memory arithmetic, scorer and importance.
        memory: The model's byte arithmetic.

    Raises:
        InvalidRequestError: `num_envs` or `max_episode_steps` is no whole number of at least 1, or
            a setting is out of its range.
        UnknownNameError: There is no such autoreset mode, render mode or other name.
    """

    metadata = {  # noqa: RUF012 - gymnasium declares it so
        **RAPPruneEnv.metadata,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.num_envs = at_least_one("num_envs", num_envs)
        self._most_steps = (
            None
            if max_episode_steps is None
            else at_least_one("max_episode_steps", max_episode_steps)
        )
        self._mode = autoreset_mode_of(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self._mode}
        self.render_mode = check_render_mode(render_mode, self.metadata["render_modes"])
        self._task = task = PruningTask(model, **settings)
        self.context, self.memory = task.context, task.memory
        self.single_observation_space = task.observations.space
        self.single_action_space = gym.spaces.Discrete(task.num_blocks)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._samplers = [task.sampler.twin() for _ in range(num_envs)]
        self._generators = [seeding.np_random() for _ in range(num_envs)]
        self._lanes = Lanes(num_envs, task)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each lane."""
        return tuple(generator for generator, _ in self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each lane's generator."""
        return tuple(seed for _, seed in self._generators)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The request of each lane."""
        return tuple(self._begun.starts[lane].request for lane in range(self.num_envs))

    @property
    def masks(self) -> tuple[BlockMask, ...]:
        """The blocks that each lane removed so far."""
        return tuple(removed.mask() for removed in self._begun.removed)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every lane, or in some.

        Args:
            seed: Seed of the first lane, those of the others following, or one for each.
            options: ``"request"`` sets the request of all these episodes, as for the single
                environment; ``"reset_mask"`` says which lanes begin one, boolean, (n,).

        Raises:
            ResetNeeded: Only some lanes are to begin, but others never did.
            InvalidRequestError: Seeds or flags are not one for each lane, or as for the single
                environment.
            RapError: As for the single environment.
        """
        rest = dict(options or {})
        flags = lane_flags(rest.pop("reset_mask", None), self.num_envs)
        if not flags.all():
            self._begun  # noqa: B018 - refuses lanes that would stay without an episode
        for lane, given in enumerate(lane_seeds(seed, self.num_envs)):
            if given is not None and flags[lane]:
                self._generators[lane] = seeding.np_random(given)
                self._samplers[lane].restart()
        self._begin(flags, rest)
        nobody = np.zeros(self.num_envs, dtype=bool)
        return self._lanes.observation(), lane_infos(self._lanes, flags, {}, nobody)

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Remove a block in each lane. If the model fails, all lanes stay where they were.

        Raises:
            ResetNeeded: A lane never began, or (without autoreset) its episode is over.
            UnknownNameError: There is no such action.
            InvalidRequestError: There is not one action for each lane.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        lanes = self._begun
        active = self._active()
        index = lane_actions(actions, active, self._task)
        move = lanes.plan(index, active)
        terms, measured = lanes.price(move)
        lanes.make(move, measured)
        truncated = move.truncated
        if self._most_steps is not None:
            truncated = truncated | (active & (lanes.steps >= self._most_steps))
        rewards = np.asarray(sum(terms.values()))
        lanes.over = move.terminated | truncated | ~active
        final: dict[str, Any] = {}
        if self._mode == AutoresetMode.NEXT_STEP:
            self._begin(~active)
        elif self._mode == AutoresetMode.SAME_STEP and lanes.over.any():
            done, active = lanes.over.copy(), active & ~lanes.over
            final = final_infos(lanes, done, terms)
            self._begin(done)
        everybody = np.ones(self.num_envs, dtype=bool)
        infos = {**final, **lane_infos(lanes, everybody, terms, active)}
        return lanes.observation(), rewards, move.terminated, truncated, infos

    def action_masks(self) -> Flags:
        """True for each block that may still be removed, shape (n, 2L)."""
        return self._begun.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """Each lane as `rap_env.RAPPruneEnv.render` shows it."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        draw = render_ansi if self.render_mode == "ansi" else render_rgb
        states = zip(self.requests, self.masks, self._lanes.measured, strict=True)
        return tuple(
            draw(Scene(self.memory, request, mask, None if measured is None else measured.loss))
            for request, mask, measured in states
        )

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a single environment has under a name, for each lane; methods are called."""
        value = getattr(self, _EACH.get(name, name))
        value = value(*args, **kwargs) if callable(value) else value
        differs = name in _EACH and value is not None
        return tuple(value) if differs else (value,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """As `call`."""
        return self.call(name)

    def get_state(self) -> list[dict[str, Any]]:
        """Where each lane stands, as plain JSON values: generator, workload and episode."""
        return [
            {
                "generator": self.np_random[lane].bit_generator.state,
                "position": self._samplers[lane].position,
                **self._begun.get_state(lane),
            }
            for lane in range(self.num_envs)
        ]

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> Observation:
        """Go on from what `get_state` gave; scores that are not known are measured again.

        Returns:
            The observation there.

        Raises:
            RapError: The model does not have those blocks or cannot serve those requests.
        """
        for lane, state in enumerate(states):
            self._generators[lane][0].bit_generator.state = state["generator"]
            self._samplers[lane].restart(state["position"])
            self._lanes.set_state(lane, state)
        return self._lanes.observation()

    @property
    def _begun(self) -> Lanes:
        if len(self._lanes.starts) < self.num_envs:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._lanes

    def _active(self) -> Flags:
        """Lanes that act in this step, (n,); the others begin an episode."""
        over = self._lanes.over
        if self._mode != AutoresetMode.NEXT_STEP and over.any():
            raise ResetNeeded(
                f"The episodes of lanes {np.flatnonzero(over).tolist()} are over; call "
                "reset(options={'reset_mask': flags}) for them before the next step()."
            )
        return ~over

    def _begin(self, flags: Flags, options: Mapping[str, Any] | None = None) -> None:
        """Begin an episode in the lanes with a flag; if one cannot, none does."""
        starts = {
            lane: self._task.start(self._samplers[lane], self._generators[lane][0], options)
            for lane in np.flatnonzero(flags).tolist()
        }
        for lane, start in starts.items():
            self._lanes.begin(lane, start, self._task.dense)
