"""Batches of observations of plans, and ways from the native plan to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import Counts
from rap_env.ladder.observation import Observation, ObservationEncoder, ObservedPlans
from rap_env.request import Request

Flags = npt.NDArray[np.bool_]


class PlanObserver:
    """Observes batches of n plans under some requests, on a model whose ladder has N items.

    A plan is given by the positions of its levels, see `rap_env.ladder.items.Ladder.positions`.

    Args:
        encoder: Encodes the observations.
        requests: The requests; the methods refer to them by index.

    Raises:
        InvalidRequestError: The model cannot serve a request.
    """

    def __init__(self, encoder: ObservationEncoder, requests: Sequence[Request]) -> None:
        self.ladder = encoder.ladder
        self._plans = ObservedPlans(encoder, len(requests))
        self._plans.put(np.arange(len(requests)), requests)
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
        peaks = self._plans.costs.peaks(positions, which)
        return np.asarray(np.maximum(0, peaks - self._plans.budget_bytes[which]))

    def observe(self, which: Counts, positions: Counts) -> Observation:
        """The observations of plans; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``ladder`` (n, N, F) and ``action_mask`` (n, N), all float32.
        """
        seen = self._plans.observe(positions, which, self._plans.costs.peaks(positions, which))
        return {**seen, "action_mask": seen["action_mask"].astype(np.float32)}

    def act(self, which: Counts, positions: Counts, items: Counts) -> Counts:
        """The positions after items, (n,), and all that are taken with them, were lowered."""
        return self._plans.costs.lowered(positions, items, which)

    def right_actions(self, which: Counts, positions: Counts, targets: Counts) -> Flags:
        """The items that a plan on the way to a target may lower next, (n, N).

        These are the items whose next level is not below their target. Levels that caches take
        together are right as soon as one of them needs them. The cache of a block that the target
        removes is lowered only together with others.

        Args:
            which: Index of each plan's request, (n,).
            positions: The positions of each plan's levels, (n, N).
            targets: Those of the target's levels, (n, N).
        """
        costs = self._plans.costs
        lower = costs.nexts(costs.levels(positions, which))
        stays = targets < self._lengths  # a cache that goes with its block is past its last level
        right = (lower >= 0) & (lower <= targets) & stays
        for shared in self.ladder.shared_positions:
            takes = lower[:, self._caches] == shared
            needed = (right[:, self._caches] & takes).any(axis=1, keepdims=True)
            right[:, self._caches] |= takes & needed
        return right

    def distance(self, which: Counts, targets: Counts) -> Counts:
        """The number of right actions from the native plan to targets, (n,).

        The arguments are those of `right_actions`.
        """
        at, steps = self.start(len(which)), np.zeros(len(which), dtype=np.int64)
        while (right := self.right_actions(which, at, targets)).any():
            goes = np.asarray(right.any(axis=1))
            steps += goes
            at = np.where(goes[:, None], self.act(which, at, right.argmax(axis=1)), at)
        return steps

    def walk(
        self, which: Counts, targets: Counts, steps: Counts, rng: np.random.Generator
    ) -> tuple[Counts, Flags]:
        """Lower native plans by random right actions.

        Args:
            which: Index of each target's request, (n,).
            targets: The positions of its levels, (n, N).
            steps: Number of actions, (n,); fewer than the target's `distance`.
            rng: Source of randomness.

        Returns:
            The positions, and the right actions there, (n, N) each.
        """
        at = self.start(len(which))
        right = self.right_actions(which, at, targets)
        goes = np.flatnonzero(steps > 0)
        for number in range(1, int(steps.max(initial=0)) + 1):
            chosen = np.where(right[goes], rng.random(right[goes].shape), -1.0).argmax(axis=1)
            moved = self.act(which[goes], at[goes], chosen)
            then = self.right_actions(which[goes], moved, targets[goes])
            # Ways differ in length: a shorter one stays one step before its end.
            short = np.asarray(~then.any(axis=1))
            at[goes[~short]], right[goes[~short]] = moved[~short], then[~short]
            goes = goes[~short & (steps[goes] > number)]
        return at, right
