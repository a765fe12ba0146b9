"""Finds plans that fit: asks a policy, removes more blocks in the guard's order, keeps a floor.

It also says which plans are good enough for what is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rap_env.errors import ArtifactError, InvalidRequestError, UnknownNameError
from rap_env.levels import CacheLevel
from rap_env.plan import Plan, with_lowest_caches
from rap_env.policies.base import Policy
from rap_env.runtime.memory_estimator import BatchShape, MemoryEstimator
from rap_env.runtime.records import ControllerSettings

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

log = logging.getLogger(__name__)

FLOOR_STEP = 0.1
"""Nats per token by which each waiting request raises a floor that follows the queue."""
_ASKS = 4  # of a policy, each with a lower limit
_CACHED_RISES = 1024
RECENT_S = 30.0
"""Seconds for which a plan that ran may be the one that a new request will run with."""


def predicts(policy: Policy) -> bool:
    """Whether a policy predicts the rise in NLL of its plans."""
    return policy.delta_nll(Plan(), 1) is not None


def no_prediction_text(max_delta_nll: object, policy: str) -> str:
    """The message for a quality floor with a policy that predicts no rise in NLL."""
    return (
        f"max_delta_nll={max_delta_nll} needs a policy that predicts the rise in NLL of its plans, "
        f"as knapsack and rap do, and {policy} does not: choose such a policy, or set "
        "max_delta_nll to none."
    )


class PlanChooser:
    """Asks a policy for plans and makes them fit; it changes no model.

    A policy is asked again with a lower limit where its plan does not fit. Where the plan
    does not fit then, the guard removes more blocks in its own order. With a quality floor,
    no plan is chosen for a batch if the predicted rise in NLL of the one that fits is above
    `max_delta_nll` or unknown; floors of a batch's own requests count likewise. Whether a batch
    could fit is asked at the floor's highest value.

    Attributes:
        llm: The live model.
        estimator: Predicts bytes.
        policy: Chooses plans.
        max_delta_nll: The quality floor now, nats per token; None for no floor.
        most_delta_nll: The highest that `follow_queue` raises it to.
        rise: As `delta_nll`, with cached results.

    Raises:
        InvalidRequestError: The floor is no finite number of at least 0, or the policy
            predicts no rise in NLL.
        UnknownNameError: There is no such block in the guard's order.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        policy: Policy,
        estimator: MemoryEstimator,
        settings: ControllerSettings,
    ) -> None:
        self.llm = llm
        self.estimator = estimator
        self._guard_order = settings.guard_order
        self.use_policy(policy, settings.max_delta_nll, settings.most_delta_nll)

    def use_policy(
        self,
        policy: Policy,
        max_delta_nll: float | None,
        most_delta_nll: float | None = None,
    ) -> None:
        """Ask a policy from now on, with a quality floor; hold the model's lock in a service.

        Raises:
            InvalidRequestError: As for the class.
            UnknownNameError: As for the class.
        """
        self.policy = policy
        self.max_delta_nll = self._least_delta_nll = max_delta_nll
        self.most_delta_nll = None if max_delta_nll is None else most_delta_nll or max_delta_nll
        num_blocks = self.estimator.memory.facts.num_blocks
        order = policy.order if self._guard_order is None else self._guard_order
        self._order = None if order is None else tuple(order)
        blocks = range(num_blocks) if self._order is None else self._order
        self._all_removable = Plan.removing(*blocks).check(num_blocks)
        self.rise = lru_cache(maxsize=_CACHED_RISES)(self.delta_nll)
        if max_delta_nll is not None:
            if not 0 <= max_delta_nll < math.inf:
                raise InvalidRequestError(
                    "max_delta_nll must be at least 0 nats per token and finite, not "
                    f"{max_delta_nll}."
                )
            if not predicts(policy):
                raise InvalidRequestError(no_prediction_text(max_delta_nll, policy.name))

    # Quality

    def follow_queue(
        self, waiting: int, plan: Plan, running: BatchShape, *, stalled: bool = False
    ) -> float:
        """Move the floor with the queue: up by `FLOOR_STEP` for each request that waits.

        It never falls below the rise of the plan with which a batch runs, so that nothing is
        preempted because the queue has become shorter; it is back when a better plan fits.

        Args:
            waiting: Requests that wait.
            plan: The present plan.
            running: The batch that runs with it.
            stalled: Whether nothing has run for long: the floor has its highest value then.

        Returns:
            The floor; infinite without one.
        """
        least, most = self._least_delta_nll, self.most_delta_nll
        if least is None or most is None:
            return math.inf
        floor = most if stalled else min(most, least + FLOOR_STEP * max(0, waiting))
        if running:
            present = self.rise(plan, running.longest_tokens)
            floor = max(floor, min(most, present or 0.0))
        self.max_delta_nll = floor
        return floor

    @property
    def most_floor(self) -> float:
        """The highest value of the quality floor, nats per token; infinite without one."""
        return math.inf if self.most_delta_nll is None else self.most_delta_nll

    def floor_clause(self, shape: BatchShape) -> str:
        """Words that qualify "plan" in messages about the quality floor; empty without a floor."""
        floor = min(self.most_floor, shape.max_delta_nll)
        if floor == math.inf:
            return ""
        return f" with a predicted rise in NLL of at most {floor} nats per token (max_delta_nll)"

    def delta_nll(self, plan: Plan, seq_len_tokens: int) -> float | None:
        """Rise in NLL that the policy predicts for a plan, nats per token; any thread may call it.

        Args:
            plan: The plan; the native one has a rise of 0.
            seq_len_tokens: Length of sequences, on which the cost of windows depends.

        Returns:
            The prediction; None if the policy has none for the plan.
        """
        if not plan:
            return 0.0
        try:
            return self.policy.delta_nll(plan, seq_len_tokens)
        except (UnknownNameError, ArtifactError):  # a level that was not measured
            return None

    def allows(self, plan: Plan, shape: BatchShape, floor: float) -> bool:
        """Whether a batch may run with a plan, by a floor and its own; any plan may be idle."""
        floor = min(floor, shape.max_delta_nll)
        if not shape or floor == math.inf:
            return True
        rise = self.rise(plan, shape.longest_tokens)
        return rise is not None and rise <= floor

    # Plans

    def choose(self, shape: BatchShape, limit_bytes: int, floor: float) -> Plan | None:
        """The policy's plan for a batch, made to fit a limit; None if none fits that is allowed."""
        plan = self._fitting(shape, limit_bytes)
        return plan if plan is not None and self.allows(plan, shape, floor) else None

    def fits(self, plan: Plan, shape: BatchShape, limit_bytes: int, floor: float) -> bool:
        """Whether a plan fits a limit for a batch, and is allowed."""
        fits = self.estimator.peak_bytes(plan, shape) <= limit_bytes
        return fits and self.allows(plan, shape, floor)

    def could_fit(self, shape: BatchShape, limit_bytes: int) -> bool:
        """Whether some plan that may ever be allowed fits a limit; any thread may call it."""
        floor = self.most_floor
        if self.fits(self.llm.plan, shape, limit_bytes, floor):  # faster than a search
            return True
        if min(floor, shape.max_delta_nll) == math.inf:
            return self._smallest_bytes(shape, limit_bytes) <= limit_bytes
        plan = self._fitting(shape, limit_bytes)
        return plan is not None and self.allows(plan, shape, floor)

    def least_rise(self, shape: BatchShape, limit_bytes: int) -> float | None:
        """Rise in NLL of the plan for a limit, allowed or not, at the batch's longest sequence.

        It is None if no plan fits, or without a prediction. Any thread may call it.
        """
        plan = self._fitting(shape, limit_bytes)
        if plan is None:
            return None
        return self.rise(plan, shape.longest_tokens)

    def guard_order(self, shape: BatchShape, plan: Plan = Plan()) -> Sequence[int]:
        """Indices of the blocks that the guard may remove from a plan, in the order of removal."""
        if self._order is not None:
            return self._order
        freed = self.estimator.freed_bytes(shape, plan)
        return sorted(range(len(freed)), key=lambda index: -freed[index])

    def smallest(self, shape: BatchShape, limit_bytes: int) -> Plan:
        """A small plan: all that the guard may remove, else the policy's plan.

        Where the former does not fit, the guard's blocks are removed from the policy's least
        plan.
        """
        mask = self._all_removable
        if not mask:
            return self._ask_policy(shape, limit_bytes - self.estimator.surcharge_bytes(shape))
        if self.estimator.peak_bytes(mask, shape) <= limit_bytes:
            return mask
        plans = mask, self._ask_policy(shape, 1).without(*mask.removed)
        return min(plans, key=lambda plan: self.estimator.peak_bytes(plan, shape))

    def _smallest_bytes(self, shape: BatchShape, limit_bytes: int) -> int:
        return self.estimator.peak_bytes(self.smallest(shape, limit_bytes), shape)

    def _fitting(self, shape: BatchShape, limit_bytes: int) -> Plan | None:
        """A plan for a limit, whatever its quality; None if there is none."""
        if self._all_removable and self._smallest_bytes(shape, limit_bytes) > limit_bytes:
            return None
        plan = self._policy_plan(shape, limit_bytes)
        if self.estimator.peak_bytes(plan, shape) <= limit_bytes:
            return plan
        return self.removing_more(plan, shape, limit_bytes)

    def removing_more(self, plan: Plan, shape: BatchShape, limit_bytes: int) -> Plan | None:
        """A plan without more blocks, in the guard's order, until it fits; None if it never does.

        It needs no weights that the plan does not need. The quality floor is not asked.
        """
        order = self.guard_order(shape, plan)
        return self.estimator.shrink_to_fit(plan, order, shape, limit_bytes)

    def _policy_plan(self, shape: BatchShape, limit_bytes: int) -> Plan:
        """The policy's plan; one for a lower budget if that needs more than the limit."""
        budget = limit_bytes - self.estimator.surcharge_bytes(shape)
        plan = self._ask_policy(shape, budget)
        for _ in range(_ASKS - 1):
            over = self.estimator.peak_bytes(plan, shape) - limit_bytes
            if over <= 0:
                break
            more = self.estimator.surcharge_bytes(shape, plan)
            budget = min(budget - over, limit_bytes - more)
            smaller = self._ask_policy(shape, budget) if budget > 0 else plan
            if smaller == plan:
                break
            plan = smaller
        return plan

    def _ask_policy(self, shape: BatchShape, budget_bytes: int) -> Plan:
        """The policy's plan; nothing is lowered if the policy fails."""
        try:
            return self.estimator.memory.check_plan(self.policy.choose(shape.request(budget_bytes)))
        except Exception:
            log.exception("Policy %r failed; the guard chooses the plan.", self.policy.name)
            return Plan()


class KeptQuality:
    """The bound on how much worse than the plan of a request what is kept may be.

    A block is used for a request if each plan under which it was read, with the levels that
    its keys and values have now, predicts a rise in NLL of at most `max_rise` more than the
    plan of the request, and no more than the floors allow. The plan of a request is the worst
    of the present one and of those that ran in the last `RECENT_S`: where the budget moves, a
    request that begins in a good moment runs under lower plans too. With a `max_rise` of 0 it
    is the present plan alone. Without predictions, only equal plans are used.

    Args:
        llm: The live model.
        chooser: Predicts the rise in NLL of plans.
        max_rise: Nats per token.
        clock: Gives the time in seconds.

    Attributes:
        max_rise: As given.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        chooser: PlanChooser,
        max_rise: float,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._clock = clock
        self._last_ran_s: dict[Plan, float] = {}
        self.max_rise = max_rise
        self._useful_bits = lru_cache(maxsize=16)(self._find_useful_bits)

    def note_pass(self, plan: Plan) -> None:
        """The model has run with a plan."""
        self._last_ran_s[plan] = self._clock()

    def may_use(
        self, plans: frozenset[Plan], levels: Plan, tokens: int, floor: float | None = None
    ) -> bool:
        """Whether blocks read under plans may serve, with the levels that they have now.

        Args:
            plans: The plans.
            levels: A plan with the levels.
            tokens: Tokens of the sequence that they would serve.
            floor: The floor of its request; None for none of its own.
        """
        plan = self._llm.plan
        own = {with_lowest_caches(each, levels) for each in plans}
        if own == {plan}:
            return True
        rise = self._chooser.rise
        of_plan = rise(plan, tokens)
        if of_plan is None:
            return False
        oldest_s = self._clock() - RECENT_S
        self._last_ran_s = {p: s for p, s in self._last_ran_s.items() if s >= oldest_s}
        recent = (rise(each, tokens) for each in (self._last_ran_s if self.max_rise else ()))
        worst = max([of_plan, *(each for each in recent if each is not None)])
        floors = self._chooser.max_delta_nll, floor
        most = min([worst + self.max_rise, *(each for each in floors if each is not None)])
        return all(
            (own_rise := rise(each, tokens)) is not None and own_rise <= most for each in own
        )

    def useful_bits(self, plans: frozenset[Plan]) -> list[dict[int, int]]:
        """Bits of layers to which what was read under plans may be lowered, and still serve."""
        tokens = self._llm.facts.max_positions
        useful = self._useful_bits(self._llm.plan, self._chooser.max_delta_nll)
        return [bits for bits in useful if self.may_use(plans, _caches(bits), tokens)]

    def _find_useful_bits(self, plan: Plan, floor: float | None) -> list[dict[int, int]]:
        """As `useful_bits`, for what is read under the present plan, with a floor.

        First int8 in all layers, then int4 in as many as the bound allows, those with the
        least predicted rise first.
        """
        layers, useful = range(self._llm.adapter.num_layers), list[dict[int, int]]()
        most = self._rise_at(plan, {}) + self.max_rise
        most = most if floor is None else min(most, floor)
        extra = {n: self._rise_at(plan, {n: 4}) - self._rise_at(plan, {n: 8}) for n in layers}
        bits = dict.fromkeys(layers, 8)
        for layer in (None, *sorted(extra, key=extra.__getitem__)):
            lowered = bits if layer is None else bits | {layer: 4}
            if not self._rise_at(plan, lowered) <= most:
                break
            useful, bits = [*useful[:1], lowered], lowered
        return useful

    def _rise_at(self, plan: Plan, bits: Mapping[int, int]) -> float:
        """Rise in NLL of a plan with caches of so many bits; NaN without a prediction."""
        tokens = self._llm.facts.max_positions
        rise = self._chooser.rise(with_lowest_caches(plan, _caches(bits)), tokens)
        return math.nan if rise is None else rise


def _caches(bits: Mapping[int, int]) -> Plan:
    """A plan in which caches have so many bits, by layer."""
    return Plan(caches=tuple((layer, CacheLevel(count)) for layer, count in bits.items()))
