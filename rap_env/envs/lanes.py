"""Episodes of many environments side by side, as arrays: what `Episode` is to one of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector.utils import create_empty_array

from rap_env.blocks import BlockMask
from rap_env.envs.episode import RemovedBlocks
from rap_env.envs.task import Due, Measured, PruningTask, Start
from rap_env.observation import BYTES_OVER, KEPT_AND_FREED, Observation
from rap_env.request import Request

Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Terms = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Move:
    """What one action in each of n lanes comes to; nothing has happened yet.

    Attributes:
        index: The block that each lane acts on, (n,); 0 where it does not act.
        valid: It acts on a block that it still has, (n,).
        invalid: It acts on a block that is gone, (n,).
        peak_bytes: Peak bytes afterwards, (n,).
        terminated: The request fits afterwards, (n,).
        truncated: There were too many invalid actions, (n,).
    """

    index: Counts
    valid: Flags
    invalid: Flags
    peak_bytes: Counts
    terminated: Flags
    truncated: Flags


class Lanes:
    """The episodes of n environments.

    Args:
        num_envs: How many there are.
        task: What they share.

    Attributes:
        starts: Request and costs of each lane that ever began an episode.
        removed: The blocks that each lane removed so far.
        measured: What the model said of each lane's mask, or None where it was not asked.
        batch_size: Of each request, (n,).
        seq_len_tokens: Of each request, (n,).
        budget_bytes: Of each request, (n,).
        asked_bytes: Budgets before they were clipped, 0 where they were not, (n,).
        peak_bytes: What each request needs with the mask, (n,).
        invalid_actions: Actions on blocks that were gone, (n,).
        steps: Steps of each episode, (n,).
        over: The episode has terminated or was truncated, (n,).
    """

    def __init__(self, num_envs: int, task: PruningTask) -> None:
        self._task = task
        self._rows = np.arange(num_envs)
        self.starts: dict[int, Start] = {}
        self.removed = [RemovedBlocks() for _ in range(num_envs)]
        self.measured: list[Measured | None] = [None] * num_envs
        self.invalid_actions, self.steps = _zeros(num_envs), _zeros(num_envs)
        self.over = np.zeros(num_envs, dtype=bool)
        self.batch_size, self.seq_len_tokens = _zeros(num_envs), _zeros(num_envs)
        self.budget_bytes, self.asked_bytes = _zeros(num_envs), _zeros(num_envs)
        self._dense_peak, self.peak_bytes, self._ffn_left = (_zeros(num_envs) for _ in range(3))
        self._freed = np.zeros((num_envs, task.num_blocks), dtype=np.int64)
        self._seen: Any = create_empty_array(task.observations.space, num_envs)

    def begin(
        self, lane: int, start: Start, measured: Measured | None, removed: Collection[int] = ()
    ) -> None:
        """Begin an episode in one lane, or go on with one.

        Args:
            lane: Which one.
            start: Its request and costs.
            measured: What the model said of its mask.
            removed: The blocks that it has removed; none at the beginning.
        """
        request, costs = start.request, start.costs
        self.starts[lane], self.removed[lane] = start, RemovedBlocks(removed)
        self.measured[lane] = measured
        self.invalid_actions[lane] = self.steps[lane] = 0
        self.over[lane] = False
        self.budget_bytes[lane] = request.budget_bytes
        self.batch_size[lane] = request.batch_size
        self.seq_len_tokens[lane] = request.seq_len_tokens
        self.asked_bytes[lane] = start.asked_budget_bytes or 0
        self._dense_peak[lane] = costs.dense_peak_bytes
        self.peak_bytes[lane] = costs.peak_bytes(removed)
        self._freed[lane] = costs.freed_bytes
        self._ffn_left[lane] = self._task.num_blocks // 2 - sum(index % 2 for index in removed)
        for key, array in self._task.observations.build(request, self.removed[lane].mask()).items():
            self._seen[key][lane] = array

    def plan(self, index: Counts, active: Flags) -> Move:
        """What it comes to if each `active` lane acts on block `index` (0 elsewhere), (n,) both."""
        kept = self._seen["action_mask"][self._rows, index] > 0
        valid, invalid = active & kept, active & ~kept
        peak = self.peak_bytes - self._freed[self._rows, index] * valid
        last_ffn = valid & (self._ffn_left == 1) & (index % 2 == 1)
        for lane in np.flatnonzero(last_ffn).tolist():  # seldom
            peak[lane] -= self.starts[lane].costs.last_ffn_bytes
        terminated = active & (peak <= self.budget_bytes)
        strikes = self.invalid_actions + invalid
        truncated = active & ~terminated & (strikes >= self._task.most_invalid)
        return Move(index, valid, invalid, peak, terminated, truncated)

    def price(self, move: Move) -> tuple[Terms, dict[int, Measured]]:
        """What a move pays: the reward's terms, (n,) each, and by lane what they were found from.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        task = self._task
        ends, acts = move.terminated | move.truncated, move.valid | move.invalid
        due = np.flatnonzero(acts if task.reward.pays_every_step else ends).tolist()
        paid = task.pay([self._due(lane, move, bool(ends[lane])) for lane in due]) if due else []
        measured: dict[int, Measured] = {}
        terms = {name: np.zeros(len(ends)) for name in task.reward.nothing()}
        for lane, (found, shares) in zip(due, paid, strict=True):
            measured[lane] = found
            for name, value in shares.items():
                terms[name][lane] = value
        terms["invalid_action"] = np.where(move.invalid, -task.penalty, 0.0)
        return terms, measured

    def _due(self, lane: int, move: Move, ends: bool) -> Due:
        """The step of a lane that pays."""
        before = self.measured[lane]
        mask = self.removed[lane].mask(int(move.index[lane]))
        return Due(self.starts[lane], mask, None if before is None else before.loss, ends)

    def make(self, move: Move, measured: dict[int, Measured]) -> None:
        """Let a move happen.

        Args:
            move: What `plan` gave.
            measured: What the model said of new masks, by lane, as from `price`.
        """
        lanes = np.flatnonzero(move.valid)
        blocks = move.index[lanes]
        for lane, block in zip(lanes.tolist(), blocks.tolist(), strict=True):
            self.removed[lane].add(block)
            self.measured[lane] = None
        for lane, found in measured.items():
            self.measured[lane] = found
        self.invalid_actions += move.invalid
        self.steps += move.valid | move.invalid
        self._ffn_left[lanes] -= blocks % 2
        self.peak_bytes = move.peak_bytes
        self._seen["blocks"][lanes, blocks, KEPT_AND_FREED] = 0.0
        self._seen["action_mask"][lanes, blocks] = 0
        over_bytes = np.maximum(0, self.peak_bytes - self.budget_bytes)
        self._seen["request"][:, BYTES_OVER] = np.minimum(1.0, over_bytes / self._dense_peak)

    def observation(self) -> Observation:
        """What the agents see now, in arrays of its own with n rows."""
        return {key: array.copy() for key, array in self._seen.items()}

    def observation_of(self, lane: int) -> Observation:
        """What one agent sees now, in arrays of its own."""
        return {key: array[lane].copy() for key, array in self._seen.items()}

    def action_masks(self) -> Flags:
        """True for each block that may still be removed, (n, 2L)."""
        return np.asarray(self._seen["action_mask"] > 0)

    def get_state(self, lane: int) -> dict[str, Any]:
        """Where the episode of one lane stands, as plain JSON values."""
        return {
            "request": asdict(self.starts[lane].request),
            "asked_budget_bytes": self.starts[lane].asked_budget_bytes,
            "removed": self.removed[lane].names.copy(),
            "measured": self.measured[lane] is not None,
            "invalid_actions": int(self.invalid_actions[lane]),
            "steps": int(self.steps[lane]),
            "over": bool(self.over[lane]),
        }

    def set_state(self, lane: int, state: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave; a score that is not known is measured again.

        Raises:
            RapError: The model does not have those blocks or cannot serve that request.
        """
        mask = BlockMask.of(*state["removed"])
        request = Request(**state["request"])
        start = Start.of(self._task.memory, request, state["asked_budget_bytes"])
        measured = self._task.measure([mask])[0] if state["measured"] else None
        self.begin(lane, start, measured, mask.indices)
        self.invalid_actions[lane], self.steps[lane] = state["invalid_actions"], state["steps"]
        self.over[lane] = state["over"]


def _zeros(count: int) -> Counts:
    return np.zeros(count, dtype=np.int64)
