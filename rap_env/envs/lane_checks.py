"""What a user gives to a vector environment, checked and in one form for all lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from rap_env.envs.lanes import Counts, Flags
from rap_env.envs.task import PruningTask
from rap_env.errors import InvalidRequestError, UnknownNameError


def at_least_one(name: str, value: int) -> int:
    """A whole number of at least 1.

    Raises:
        InvalidRequestError: It is not.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise InvalidRequestError(f"{name} must be a whole number of at least 1, not {value!r}.")
    return int(value)


def autoreset_mode_of(mode: str | AutoresetMode) -> AutoresetMode:
    """The mode that a name stands for.

    Raises:
        UnknownNameError: There is no such mode.
    """
    known = [each.value for each in AutoresetMode]
    if not isinstance(mode, AutoresetMode) and mode not in known:
        raise UnknownNameError("autoreset mode", mode, known)
    return AutoresetMode(mode)


def lane_actions(actions: npt.NDArray[np.int64], active: Flags, task: PruningTask) -> Counts:
    """The block that each active lane acts on, 0 for the others, (n,).

    Raises:
        InvalidRequestError: There is not one action for each lane.
        UnknownNameError: There is no such action.
    """
    given = np.asarray(actions)
    if given.shape != active.shape:
        raise InvalidRequestError(
            f"step() takes an array of {len(active)} actions, one for each lane, not one of shape "
            f"{given.shape}."
        )
    whole = np.issubdtype(given.dtype, np.integer)
    wrong = active & ((given < 0) | (given >= task.num_blocks)) if whole else active
    if wrong.any():
        raise task.unknown_action(given[wrong][0].item())
    return np.where(active, given, 0).astype(np.int64)


def lane_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> Sequence[int | None]:
    """The seed of each lane: those given, or the one given and those that follow it.

    Raises:
        InvalidRequestError: There is another number of seeds than of lanes.
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        return [int(seed) + lane for lane in range(num_envs)]
    if len(seed) != num_envs:
        raise InvalidRequestError(
            f"reset() takes one seed, or one for each of {num_envs} lanes, not {len(seed)}."
        )
    return seed


def lane_flags(given: Any, num_envs: int) -> Flags:
    """The lanes that a reset is for: all, or those of a ``reset_mask``, (n,).

    Raises:
        InvalidRequestError: It is no array of a boolean for each lane, or all are false.
    """
    if given is None:
        return np.ones(num_envs, dtype=bool)
    flags = np.asarray(given)
    if flags.shape != (num_envs,) or flags.dtype != np.bool_ or not flags.any():
        raise InvalidRequestError(
            f"options['reset_mask'] must hold {num_envs} booleans, one for each lane and at least "
            f"one of them true, not {given!r}."
        )
    return flags
