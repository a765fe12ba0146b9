"""`RAPAcross-v0`: the ladder over several models, one of which is drawn at each reset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from rap_env.envs.base import PruningEnv
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.errors import InvalidRequestError
from rap_env.ladder.observation import Observation
from rap_env.request import whole_number


class RAPAcrossEnv(gym.Env[Observation, np.int64]):
    """`RAPLadder-v0` over several models, one of which is drawn at each reset.

    ## Description
    For policies that are to serve models that they never saw: train on some models, be judged
    on others. Each `reset` draws one of `models`, all with equal probability; request, actions,
    reward and end are those of `RAPLadder-v0` on that model.

    ## Observation Space and Action Space
    Those of `RAPLadder-v0` for `items` items: rows past those of the drawn model are 0, and
    actions there are invalid. All numbers are shares (of the model's native peak, of its
    layers, of its levels) or costs in nats per token, so they mean the same for each model.
    `padded` gives an observation of any other model this form.

    ## Arguments
    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `models` | required | names of models, as for `RAPLadder-v0` |
    | `items` | `None` | rows and actions; `None`: as many as the largest ladder of `models` has |

    Further arguments are those of `RAPLadder-v0`, for each model. `info` has the name of the
    drawn one as `model`. Options of `reset` are those of `RAPLadder-v0`.

    ## Version History
    - v0: First version.
    """

    metadata = PruningEnv.metadata

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        items: int | None = None,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if isinstance(models, str) or not models:
            raise InvalidRequestError(
                f"models must be a list of names, as ['tiny-deep', 'tiny-wide'], not {models!r}."
            )
        self.envs = [RAPLadderEnv(m, render_mode=render_mode, **arguments) for m in models]
        most = max(len(env.ladder) for env in self.envs)
        self.items = most if items is None else whole_number("items", items, least=most)
        for env in self.envs:
            env.num_actions = self.items
        self.render_mode, encoder = render_mode, self.envs[0].encoder
        shape = self.items, len(encoder.features)
        rows: dict[str, gym.Space[Any]] = {
            encoder.key: gym.spaces.Box(0.0, 1.0, shape, np.float32),
            "action_mask": gym.spaces.MultiBinary(self.items),
        }
        self.observation_space = gym.spaces.Dict({**encoder.space, **rows})  # type: ignore[dict-item,assignment]
        self.action_space = gym.spaces.Discrete(self.items)
        self._drawn: PruningEnv | None = None

    @property
    def drawn(self) -> PruningEnv:
        """The environment of the drawn model; a `ResetNeeded` before the first episode."""
        if self._drawn is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._drawn

    def padded(self, observation: Observation) -> Observation:
        """An observation of one model with `items` rows; the further ones are 0."""
        seen = {}
        for name, space in self.observation_space.items():  # type: ignore[attr-defined]
            seen[name] = np.zeros(space.shape, space.dtype)
            seen[name][: len(observation[name])] = observation[name]
        return seen

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a model and start an episode; errors are those of `RAPLadder-v0`."""
        super().reset(seed=seed)
        self._drawn = self.envs[self.np_random.integers(len(self.envs))]
        drawn_seed = int(self.np_random.integers(2**31))
        observation, info = self._drawn.reset(seed=drawn_seed, options=options)
        return self.padded(observation), {**info, "model": self._drawn.memory.facts.name}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an action on the drawn model; errors are those of `RAPLadder-v0`."""
        observation, reward, terminated, truncated, info = self.drawn.step(action)
        info = {**info, "model": self.drawn.memory.facts.name}
        return self.padded(observation), reward, terminated, truncated, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each action that is valid, shape (items,)."""
        masks = np.zeros(self.items, dtype=bool)
        masks[: len(self.drawn.ladder)] = self.drawn.action_masks()
        return masks

    def render(self) -> Any:
        """As `RAPLadder-v0` on the drawn model."""
        return self.drawn.render()
