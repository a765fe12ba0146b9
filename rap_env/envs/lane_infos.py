"""The infos of many environments in gymnasium's form: arrays with flags beside them.

An entry ``key`` of a vector environment's info holds a value for each lane, and ``_key`` says
which lanes have it. Where a lane has none, numbers are 0 and objects None, as gymnasium's own
vector environments fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.envs.lanes import Flags, Lanes, Terms


def lane_infos(lanes: Lanes, shown: Flags, terms: Terms, paid: Flags) -> dict[str, Any]:
    """What the lanes `shown` would say of themselves as single environments.

    Args:
        lanes: The episodes of n environments.
        shown: Lanes to tell of, (n,).
        terms: The reward's terms by name, (n,) each.
        paid: Lanes that have such terms, (n,).
    """
    request = {
        "batch_size": lanes.batch_size,
        "seq_len_tokens": lanes.seq_len_tokens,
        "budget_bytes": lanes.budget_bytes,
    }
    told = {
        **_entry("removed", _objects(shown, lambda lane: lanes.removed[lane].names.copy()), shown),
        **_entry("peak_bytes", lanes.peak_bytes, shown),
        **_entry("request", _entries(request, shown), shown),
        **_entry("reward_terms", _entries(terms, paid & shown), shown),
        **_measured(lanes, shown),
    }
    clipped = shown & (lanes.asked_bytes > 0)
    if clipped.any():
        asked = _entries({"asked_budget_bytes": lanes.asked_bytes}, clipped)
        told.update(_entry("infeasible", asked, clipped))
    return told


def final_infos(lanes: Lanes, done: Flags, terms: Terms) -> dict[str, Any]:
    """What lanes say whose episode is over and will be followed by another in the same step."""
    told = lane_infos(lanes, done, terms, done)
    seen = _objects(done, lanes.observation_of)
    return {**_entry("final_obs", seen, done), **_entry("final_info", told, done)}


def _measured(lanes: Lanes, shown: Flags) -> dict[str, Any]:
    """What the model said of masks, where it was asked."""
    pairs = zip(lanes.measured, shown.tolist(), strict=True)
    found = [measured if show else None for measured, show in pairs]
    known = np.array([one is not None for one in found])
    if not known.any():
        return {}
    predicted = np.array([one is not None and one.predicted for one in found])
    baselines = [None if one is None else one.baseline_loss for one in found]
    compared = np.array([loss is not None for loss in baselines])
    losses = np.array([loss or 0.0 for loss in baselines])
    return {
        **_entry("nll", np.array([0.0 if one is None else one.nll for one in found]), known),
        **_entry("loss", np.array([0.0 if one is None else one.loss for one in found]), known),
        **(_entry("baseline_loss", losses, compared) if compared.any() else {}),
        **(_entry("predicted", predicted, predicted) if predicted.any() else {}),
    }


def _entry(key: str, value: Any, has_it: Flags) -> dict[str, Any]:
    """A value for each lane, and the flags that say which lanes have it."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = value * has_it  # 0 where a lane has none
    return {key: value, f"_{key}": has_it.copy()}


def _entries(values: Mapping[str, npt.NDArray[Any]], has_it: Flags) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if has_it.any():
        for key, value in values.items():
            told.update(_entry(key, value, has_it))
    return told


def _objects(has_it: Flags, value_of: Callable[[int], Any]) -> npt.NDArray[np.object_]:
    """An array with an object for each lane that has one, None for the others."""
    array = np.empty(len(has_it), dtype=object)
    for lane in np.flatnonzero(has_it).tolist():
        array[lane] = value_of(lane)
    return array
