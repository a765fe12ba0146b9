"""Policies of a replay that know more than a request: an oracle, and one that measures live."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from agents.baselines.base import price_per_byte
from experiments.replay.budgets import Budget
from rap_env.blocks import BlockMask
from rap_env.costs import RequestCosts, request_costs
from rap_env.memory import MemoryModel
from rap_env.policy import MaskPolicy
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer


class Surroundings(Protocol):
    """What policies that know more than a request are told by whoever runs them."""

    def remaining_s(self) -> float:
        """Seconds that what runs will go on."""

    def time_s(self) -> float:
        """The time of the replay."""

    def margin_bytes(self) -> int:
        """Bytes that the controller keeps free below the budget."""

    def measuring(self) -> AbstractContextManager[None]:
        """To be entered while a policy runs the model itself: what that takes is counted."""


class OraclePolicy:
    """Another policy that knows the future budget.

    It chooses for the least budget over the time that what runs will still need, so that no mask
    has to be changed while they run: what it removes early would be removed anyhow.

    Args:
        inner: The other policy.
        budget: The budget of the whole replay.
        around: Tells the time, and how long what runs will go on.
    """

    name = "oracle"

    def __init__(self, inner: MaskPolicy, budget: Budget, around: Surroundings) -> None:
        self._inner = inner
        self._budget = budget
        self._around = around

    def choose(self, request: Request) -> BlockMask:
        """A mask for the request under the least budget that is to come for it.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
        """
        now = self._around.time_s()
        least = self._budget.least(now, now + self._around.remaining_s())
        budget_bytes = max(1, min(request.budget_bytes, least - self._around.margin_bytes()))
        return self._inner.choose(Request(request.batch_size, request.seq_len_tokens, budget_bytes))


class GreedyPolicy:
    """Greedy per byte, measured while it serves.

    It keeps one path of removals. A request gets the first blocks of the path, as many as it
    needs; where all of it does not suffice, the path grows by the block whose loss is least per
    byte that it frees, which takes a measurement of every block that is left. The path is
    forgotten when the dense model fits again. A mask that was measured before is not measured
    again: the text is the same.

    Args:
        memory: The model's byte arithmetic.
        scorer: Measures masks.
        around: Counts what the measuring takes.
    """

    name = "greedy"

    def __init__(self, memory: MemoryModel, scorer: MaskScorer, around: Surroundings) -> None:
        self._memory = memory
        self._scorer = scorer
        self._around = around
        self._path: list[int] = []

    def choose(self, request: Request) -> BlockMask:
        """The first blocks of the path, as many as the budget asks for.

        Raises:
            InvalidRequestError: The model cannot serve the batch or the length.
        """
        costs = request_costs(self._memory, request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes:
            self._path.clear()
            return BlockMask()
        if costs.least_peak_bytes > request.budget_bytes:
            return BlockMask.all_of(self._memory.facts.blocks)
        while costs.peak_bytes(self._path) > request.budget_bytes:
            self._path.append(self._next(costs, request.budget_bytes))
        return costs.remove_until_fits(self._path, request.budget_bytes)

    def _next(self, costs: RequestCosts, budget_bytes: int) -> int:
        """The block that is best removed after those of the path."""
        mask = BlockMask.of(*self._path)
        over = costs.peak_bytes(self._path) - budget_bytes
        with self._around.measuring():
            nll = self._scorer.nll(mask)
            scan = self._scorer.scan(mask)
        prices = {
            block.index: price_per_byte(found - nll, min(costs.freed[block.index], over))
            for block, found in scan.items()
        }
        return min(prices, key=prices.__getitem__)
