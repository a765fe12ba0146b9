"""The episode of one environment, updated with each action instead of being recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from rap_env.costs import Counts, Flags
from rap_env.observation import BYTES_OVER, Observation, bytes_over
from rap_env.plan import Plan
from rap_env.request import Request


class Measurement(NamedTuple):
    """Measurements of a mask or plan by the model.

    Attributes:
        nll: NLL in nats per token.
        delta_nll: NLL minus that of the model at the start of an episode.
        predicted: Whether the score is the prediction of a score table, not a measurement.
        baseline_delta_nll: The ΔNLL of the plan that the reward's baseline has for the same
            request, or None where the reward did not ask for it.
    """

    nll: float
    delta_nll: float
    predicted: bool
    baseline_delta_nll: float | None = None


class EpisodeCosts(Protocol):
    """Bytes of one batch size and sequence length, whatever the budget."""

    @property
    def dense_peak_bytes(self) -> int:
        """Peak bytes at the start of an episode."""

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache at the start of an episode."""

    @property
    def least_peak_bytes(self) -> int:
        """Peak bytes once no valid action is left: every episode ends by then."""


CostsT = TypeVar("CostsT", bound=EpisodeCosts)
_StartsWith = TypeVar("_StartsWith", contravariant=True)


@dataclass(frozen=True)
class EpisodeStart(Generic[CostsT]):
    """The initial state of an episode: the unchanged model under a request.

    Attributes:
        costs: What the model needs for it, and what each action frees.
        asked_budget_bytes: The budget before it was raised to the least possible one, or None.
    """

    request: Request
    costs: CostsT
    asked_budget_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the unchanged model fits the request, so that there is nothing to do."""
        return self.costs.dense_peak_bytes <= self.request.budget_bytes

    @property
    def feasible(self) -> bool:
        """Whether an episode can meet the budget."""
        return self.costs.least_peak_bytes <= self.request.budget_bytes


class EpisodeState(Protocol):
    """What an episode has done to the model, its peak bytes, and the observation of it."""

    observation: Observation
    """The current arrays, updated in place; the request's bytes over budget excepted."""

    @property
    def peak_bytes(self) -> int:
        """Peak bytes now."""

    def is_valid(self, action: int) -> bool:
        """Whether an action changes anything."""

    def peak_after(self, action: int) -> int:
        """Peak bytes after a valid action."""

    def plan_after(self, action: int | None = None) -> Plan:
        """The mask or plan after an action, valid or not; without one, the current one."""

    def apply(self, action: int) -> None:
        """Take a valid action."""

    def info(self, *, arrays: bool) -> dict[str, Any]:
        """The entry of `info` that says what was done, in new lists or in a new array."""


class VectorState(Protocol[_StartsWith]):
    """What n episodes have done to the model, and their peak bytes."""

    info_key: str
    """The entry of infos and saved states that says what was done."""

    @property
    def dense_peak_bytes(self) -> Counts:
        """Peak bytes of each request at the start of its episode, (n,)."""

    @property
    def peak_bytes(self) -> Counts:
        """Peak bytes of each request now, (n,)."""

    def start(
        self, rows: Counts, costs: Sequence[_StartsWith], plan: Plan, seen: Observation, /
    ) -> None:
        """Start the sub-environments `rows`, (m,), all with a mask or plan.

        What `seen`, the arrays of all observations, has of their masks or plans is updated; the
        features of the request are not.
        """

    def peak_after(self, actions: Counts, valid: Flags, /) -> Counts:
        """Peak bytes of each request, (n,), if the valid actions are taken."""

    def apply(
        self, actions: Counts, valid: Flags, peak_bytes: Counts, seen: Observation, /
    ) -> None:
        """Take the valid actions, after which the requests need `peak_bytes`; all (n,).

        `seen` is updated as by `start`.
        """

    def plans(self, rows: Counts, actions: Counts | None = None, /) -> Sequence[Plan]:
        """The masks or plans of the sub-environments `rows`, (m,), now or after actions, (m,)."""

    def infos(self, rows: Counts, /) -> list[list[str]]:
        """The values of `info_key` for the sub-environments `rows`, (m,), new lists."""

    def info_array(self) -> npt.NDArray[np.int8]:
        """The values of `info_key` as a new array, (n, actions)."""

    def saved_plan(self, state: Mapping[str, Any], /) -> Plan:
        """The mask or plan of a saved state."""


def usable_masks(masks: npt.NDArray[np.int8]) -> None:
    """Fill action masks without a valid action with ones, in place; shape (..., actions).

    Only an episode that is over has none left. A step that only starts the next episode (the
    next-step autoreset of gymnasium) ignores its action, but an agent still chooses one, and
    logits that are all masked give NaN.
    """
    masks[~masks.any(axis=-1)] = 1


class Episode(Generic[CostsT]):
    """The state of one episode. It returns copies of its arrays.

    Attributes:
        state: What was done to the model.
        actions: The valid actions so far.
        measurement: What the model measured of the plan, or None if it was not measured.
        invalid_actions: Number of invalid actions.
        steps: Number of steps.
        over: Whether the episode has terminated or was truncated.
    """

    def __init__(
        self,
        start: EpisodeStart[CostsT],
        unchanged: Measurement,
        state: EpisodeState,
        *,
        info_arrays: bool,
    ) -> None:
        self._info_arrays = info_arrays
        self.start = start
        self.state = state
        self.actions: list[int] = []
        self.measurement: Measurement | None = unchanged
        self.invalid_actions = self.steps = 0
        self.over = False
        self._request = dict(vars(start.request))

    @property
    def delta_nll(self) -> float | None:
        """ΔNLL of the plan in nats per token, or None if it was not measured."""
        return None if self.measurement is None else self.measurement.delta_nll

    def apply(self, action: int) -> None:
        """Take a valid action."""
        state, start = self.state, self.start
        state.apply(action)
        self.actions.append(action)
        state.observation["request"][BYTES_OVER] = bytes_over(
            state.peak_bytes, start.request.budget_bytes, start.costs.dense_peak_bytes
        )

    def observation(self) -> Observation:
        """The current observation, in new arrays; see `usable_masks`."""
        observation = {key: array.copy() for key, array in self.state.observation.items()}
        if self.over:
            usable_masks(observation["action_mask"])
        return observation

    def info(self, terms: dict[str, float]) -> dict[str, Any]:
        """The info dict, with the reward's `terms` by name."""
        info: dict[str, Any] = {
            **self.state.info(arrays=self._info_arrays),
            "peak_bytes": self.state.peak_bytes,
            "request": self._request.copy(),
            "reward_terms": terms,
        }
        measurement = self.measurement
        if measurement is not None:
            info["nll"] = measurement.nll
            info["loss"] = measurement.delta_nll
            if measurement.baseline_delta_nll is not None:
                info["baseline_loss"] = measurement.baseline_delta_nll
            if measurement.predicted:
                info["predicted"] = True
        if self.start.asked_budget_bytes is not None:
            info["infeasible"] = {"asked_budget_bytes": self.start.asked_budget_bytes}
        return info
