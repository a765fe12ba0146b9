"""Batches of observations: `ItemObservationBuilder` for many plans at once, and ways to plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rap_env.ladder.items import Counts
from rap_env.ladder.observation import BYTES_OVER, Observation, ObservationEncoder, request_features
from rap_env.ladder.state import StackedCosts
from rap_env.plan import Plan
from rap_env.request import Request

Flags = npt.NDArray[np.bool_]


class PlanObserver:
    """Observes batches of n plans under some requests, on a model whose ladder has N items.

    A plan is given by the positions of its levels, see `rap_env.ladder.items.Ladder.positions`.

    Args:
        builder: Builds the observations of single plans.
        requests: The requests; the methods refer to them by index.

    Raises:
        InvalidRequestError: The model cannot serve a request.
    """

    def __init__(self, builder: ObservationEncoder, requests: Sequence[Request]) -> None:
        self._encoder, self.ladder = builder, builder.ladder
        shapes: dict[tuple[int, int], int] = {}  # bytes do not depend on the budget
        for request in requests:
            shapes.setdefault((request.batch_size, request.seq_len_tokens), len(shapes))
        self._shape = np.array([shapes[r.batch_size, r.seq_len_tokens] for r in requests])
        costs = [builder.item_bytes.costs(*shape) for shape in shapes]
        self._costs = StackedCosts.of(costs)
        self._rows = np.stack([builder.rows_of(entry.steps) for entry in costs])
        self._lengths = np.array([len(item.levels) for item in self.ladder.items])
        self._caches = np.array(self.ladder.caches, dtype=np.int64)
        self._budget = np.array([request.budget_bytes for request in requests])
        self._request = request_features(
            builder.item_bytes.memory,
            batch_size=np.array([request.batch_size for request in requests]),
            seq_len_tokens=np.array([request.seq_len_tokens for request in requests]),
            budget_bytes=self._budget,
            dense_peak_bytes=self._costs.dense_peak_bytes[self._shape],
            kv_cache_bytes=self._costs.kv_cache_bytes[self._shape],
        )

    def start(self, count: int) -> Counts:
        """The positions of `count` native plans, (count, N)."""
        return np.zeros((count, len(self.ladder)), dtype=np.int64)

    def position(self, plan: Plan) -> Counts:
        """The positions of a plan's levels, (N,).

        Raises:
            UnknownNameError: The plan has levels that the ladder does not have.
        """
        return np.array(self.ladder.positions(plan), dtype=np.int64)

    def plan(self, positions: Counts) -> Plan:
        """The plan with levels at some positions, (N,)."""
        return self.ladder.plan(positions.tolist())

    def over_bytes(self, which: Counts, positions: Counts) -> Counts:
        """Bytes above the budget, 0 where the request fits.

        Args:
            which: Index of each plan's request, (n,).
            positions: The positions of each plan's levels, (n, N).

        Returns:
            Bytes, (n,).
        """
        peaks = self._costs.peaks(positions, self._shape[which])
        return np.asarray(np.maximum(0, peaks - self._budget[which]))

    def observe(self, which: Counts, positions: Counts) -> Observation:
        """The observations of plans; the arguments are those of `over_bytes`.

        Returns:
            ``request`` (n, R), ``ladder`` (n, N, F) and ``action_mask`` (n, N), all float32.
        """
        shape, costs = self._shape[which], self._costs
        dense_peak_bytes = costs.dense_peak_bytes[shape]
        over = self.over_bytes(which, positions) / dense_peak_bytes
        request = self._request[which]
        request[:, BYTES_OVER] = np.minimum(1.0, over)
        rows = self._encoder.encode(
            self._rows[shape[:, None], np.arange(len(self.ladder)), positions],
            costs.freed_bytes(positions, shape),
            dense_peak_bytes[:, None],
        )
        valid = (costs.nexts(positions, shape) >= 0).astype(np.float32)
        return {"request": request, self._encoder.key: rows, "action_mask": valid}

    def act(self, which: Counts, positions: Counts, items: Counts) -> Counts:
        """The positions after items, (n,), and all that are taken with them, were lowered."""
        return self._costs.lowered(positions, items, self._shape[which])

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
        lower = self._costs.nexts(positions, self._shape[which])
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
