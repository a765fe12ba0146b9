"""What the runtime does next: one pure function from a snapshot to actions.

What happens after a fall of the limit is read from `decide` downwards: what is kept beside
the batch goes first, then the plan is lowered, then a part of the reserve is used, and then
the newest request is preempted. The controller does what is decided, measures, and asks
again (`rap_env.runtime.controller`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from rap_env.levels import WEIGHT_LEVELS
from rap_env.plan import Plan, with_lowest_caches
from rap_env.runtime.memory_estimator import EMPTY_BATCH, UNKNOWN_PASS, BatchShape, PassSize
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.records import Trigger

_ATTEMPTS = 4  # at making a plan fit by measured bytes
_RESERVE_PARTS = 4  # of the source's reserve, as few of which are used as suffice
TOKEN_NATS = 0.001
"""Rise in NLL, in nats, that the tokens to come must be spared for each token computed
again."""
# Nats per token, where the policy predicts none: about that of int4 caches.
_UNKNOWN_RISE = 0.016


@dataclass(frozen=True)
class Trim:
    """Return freed memory to the system."""


@dataclass(frozen=True)
class FreeKept:
    """Free bytes of what is kept beside the batch; at once, or as far as there is time now."""

    bytes: int
    at_once: bool = True


@dataclass(frozen=True)
class Borrow:
    """Let the budget have so many bytes of the source's reserve."""

    bytes: int


@dataclass(frozen=True)
class Apply:
    """Apply a plan, because of a trigger."""

    plan: Plan
    trigger: Trigger


@dataclass(frozen=True)
class EndRefill:
    """End the refill of a row, which goes on with its old cache."""


@dataclass(frozen=True)
class Refill:
    """Compute the cache of a row again at the plan's levels; it decodes with the old one."""

    row: Any


@dataclass(frozen=True)
class Preempt:
    """Put a row back into the queue."""

    row: Any


@dataclass(frozen=True)
class Admit:
    """Let a request begin."""

    request: Any


@dataclass(frozen=True)
class Wait:
    """Let the request wait: so many available bytes were too few, or it waits for lowering."""

    too_few_bytes: int | None = None


Action = Trim | FreeKept | Borrow | Apply
"""What changes memory, so that it is measured again before the next decision."""
RowAction = Refill | EndRefill | Preempt | Admit | Wait
"""What changes which rows run."""


@dataclass(frozen=True)
class CachedRow:
    """A row that decodes: the plan with the levels of its cache, and its tokens."""

    row: Any
    plan: Plan
    cached_tokens: int
    tokens_to_come: int


@dataclass(frozen=True)
class Progress:
    """What was done since the first of several decisions that follow one another.

    Attributes:
        trimmed: Whether freed memory was returned, so that all that is measured is needed.
        exact: Whether all measured bytes count, because something was just applied.
        freed: Whether as much was freed of what is kept as can be, for the present plan.
        unfinished: Whether there was no time for all of it.
        unread: Whether the weights of a plan could not be read.
        borrowed: Whether a part of the reserve was taken.
        attempts: Plans that were applied, since then.
    """

    trimmed: bool = False
    exact: bool = False
    freed: bool = False
    unfinished: bool = False
    unread: bool = False
    borrowed: bool = False
    attempts: int = 0

    def after(self, action: Action, *, failed: bool = False) -> Progress:
        """The progress after an action; `failed` if it could not be done, or not to its end."""
        done = replace(self, trimmed=True)
        if isinstance(action, FreeKept):
            return replace(done, freed=not failed, unfinished=failed)
        if isinstance(action, Apply):
            unread, attempts = self.unread or failed, self.attempts + 1
            return replace(done, exact=True, freed=False, unread=unread, attempts=attempts)
        if isinstance(action, Borrow) and action.bytes:
            return replace(done, exact=True, borrowed=True, attempts=0)
        return done


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a decision knows, besides what plans cost.

    Attributes:
        plan: The present plan.
        running: The batch that runs, at its largest.
        joined: That batch with the request that may begin; None without one.
        next_pass: Tokens of the pass that follows.
        rows_plan: The plan with the lowest levels that running rows have of caches.
        newest: The row that is preempted first.
        request: The request that may begin.
        refillable: Rows whose caches may be computed again at the plan's levels now.
        refills: Whether a row is refilled, which ends where memory is short.
        waiting: Requests that wait.
        stalled: Whether nothing has run for so long that the request may use the reserve.
        budget_bytes: The budget, with what is borrowed.
        reserve_bytes: Bytes of the source's reserve that may be borrowed.
        borrowed_bytes: Bytes of it that are.
        used_bytes: Measured bytes.
        held_bytes: Bytes of the tensors among them.
        kept_bytes: Bytes of what is kept beside the batch among these.
        margin_bytes: What passes such as the next one may take beyond predictions.
        spare_bytes: What a raised plan leaves free.
        floor: The quality floor, nats per token.
        rejected_bytes: Available bytes that were too few for `joined`; None if that was not
            tried.
        lasting_bytes: Bytes above the present need that were free long enough for a better
            plan; None if they were not, or if nothing better fitted into them.
        rests: Whether nothing has run for so long that all that fits is restored.
        readable: Whether all weights can be read.
        progress: What was done since the first decision.
    """

    plan: Plan = Plan()
    running: BatchShape = EMPTY_BATCH
    joined: BatchShape | None = None
    next_pass: PassSize = UNKNOWN_PASS
    rows_plan: Plan = Plan()
    newest: Any = None
    request: Any = None
    refillable: tuple[CachedRow, ...] = ()
    refills: bool = False
    waiting: int = 0
    stalled: bool = False
    budget_bytes: int = 0
    reserve_bytes: int = 0
    borrowed_bytes: int = 0
    used_bytes: int = 0
    held_bytes: int = 0
    kept_bytes: int = 0
    margin_bytes: int = 0
    spare_bytes: int = 0
    floor: float = math.inf
    rejected_bytes: int | None = None
    lasting_bytes: int | None = None
    rests: bool = False
    readable: bool = True
    progress: Progress = Progress()

    @property
    def shape(self) -> BatchShape:
        """The batch that a plan has to fit."""
        return self.running if self.joined is None else self.joined

    def with_borrowed(self, borrowed_bytes: int) -> Snapshot:
        """The same with so many bytes of the reserve."""
        budget_bytes = self.budget_bytes + borrowed_bytes - self.borrowed_bytes
        return replace(self, budget_bytes=budget_bytes, borrowed_bytes=borrowed_bytes)


def decide(snapshot: Snapshot, costs: PlanChooser) -> tuple[Action | RowAction, ...]:
    """What to do before the next pass, in order; nothing if it may run.

    After an action that changes memory, measure and ask again with its progress. An action
    that changes rows is the last one.
    """
    if is_crowded(snapshot, costs) and not snapshot.progress.trimmed:
        return (Trim(),)
    if snapshot.joined is None and (freeing := _free_for(snapshot.plan, snapshot, costs)):
        return freeing
    if _fits(snapshot, costs):
        return _raise_or_run(snapshot, costs)
    return _lower_or_wait(snapshot, costs)


# Where the plan does not fit


def _lower_or_wait(s: Snapshot, costs: PlanChooser) -> tuple[Action | RowAction, ...]:
    if s.refills:
        return (EndRefill(),)
    if s.progress.attempts < _ATTEMPTS and not _was_rejected(s, costs):
        plan = _smaller(s, costs)
        if plan is not None and plan != s.plan:
            trigger: Trigger = "budget_fell" if s.joined is None else "arrival"
            return _apply(plan, trigger, s, costs)
    may_borrow = s.stalled if s.joined is not None else s.running.rows == 1
    if may_borrow and (part_bytes := _next_part(s, costs)):
        return (Borrow(part_bytes),)
    repaid = (Borrow(0),) if may_borrow and s.borrowed_bytes else ()
    if s.joined is not None:
        return (*repaid, Wait(available_bytes(s, costs)))
    if s.running:
        return (*repaid, Preempt(s.newest))
    least = costs.smallest(EMPTY_BATCH, s.budget_bytes)
    if least == s.plan or s.progress.unread or s.progress.attempts > _ATTEMPTS:
        return ()  # nothing is left to preempt
    return (Apply(least, "budget_fell"),)


def _smaller(s: Snapshot, costs: PlanChooser) -> Plan | None:
    """A plan that fits, with which running rows may go on; None if there is none.

    The caches of rows may have lower levels than the plan, with which the floor holds too.
    Where weights cannot be read, the plan is the present one without more blocks.
    """
    limit_bytes = available_bytes(s, costs)
    if s.progress.unread:
        return costs.removing_more(s.plan, s.shape, limit_bytes)
    plan = costs.choose(s.shape, limit_bytes, s.floor)
    if plan is not None and s.running:
        of_rows = with_lowest_caches(plan, s.rows_plan)
        return plan if costs.allows(of_rows, s.shape, s.floor) else None
    return plan


def _was_rejected(s: Snapshot, costs: PlanChooser) -> bool:
    """Whether no more is available for the request than was too little before."""
    if s.rejected_bytes is None or s.progress.exact:
        return False
    return available_bytes(s, costs) <= s.rejected_bytes


def _next_part(s: Snapshot, costs: PlanChooser) -> int:
    """The next larger part of the reserve, if the batch could fit with all of it; else 0."""
    parts = [s.reserve_bytes * part // _RESERVE_PARTS for part in range(1, _RESERVE_PARTS + 1)]
    larger = [size for size in parts if size > s.borrowed_bytes]
    if not larger or not costs.could_fit(s.shape, exact_bytes(s.with_borrowed(larger[-1]), costs)):
        return 0
    return larger[0]


# Where it fits


def _raise_or_run(s: Snapshot, costs: PlanChooser) -> tuple[Action | RowAction, ...]:
    repays = s.joined is None and s.borrowed_bytes and not s.progress.borrowed
    if repays and _fits(s.with_borrowed(0), costs):
        return (Borrow(0),)
    if (limit_bytes := _raised_limit(s, costs)) is not None:
        if s.joined is None and not s.progress.trimmed:
            return (Trim(),)
        plan = costs.choose(s.shape, limit_bytes, s.floor)
        if plan is not None and improves(plan, s, costs):
            trigger: Trigger = "room" if s.joined is None else "arrival"
            return _apply(plan, trigger, s, costs)
    if s.joined is None:
        return _refill(s, costs)
    if s.progress.unfinished and s.running:
        return (Wait(),)  # what runs goes on meanwhile
    return _free_for(s.plan, s, costs, at_once=False) or (Admit(s.request),)


def _refill(s: Snapshot, costs: PlanChooser) -> tuple[RowAction, ...]:
    """Refill the row that gains most by it, if one does."""
    gains = {row: refill_gain(row, s.plan, costs) for row in s.refillable}
    best = max(gains, key=gains.__getitem__, default=None)
    return () if best is None or gains[best] <= 0 else (Refill(best.row),)


def refill_gain(row: CachedRow, plan: Plan, costs: PlanChooser) -> float:
    """Nats that a row gains if its cache is computed again for a plan.

    That is the rise in NLL that its tokens to come are spared, less `TOKEN_NATS` for each
    token that has to be computed.
    """
    tokens = row.cached_tokens + row.tokens_to_come
    before, after = (costs.rise(each, tokens) for each in (row.plan, plan))
    spared = _UNKNOWN_RISE if before is None or after is None else before - after
    return row.tokens_to_come * spared - row.cached_tokens * TOKEN_NATS


def _raised_limit(s: Snapshot, costs: PlanChooser) -> int | None:
    """Bytes that a better plan may need; None if this is not the time for one."""
    if not s.plan or not s.readable or s.progress.exact:
        return None
    spare_bytes = s.spare_bytes + s.borrowed_bytes
    if s.joined is not None:
        return None if s.running else s.budget_bytes - spare_bytes - s.margin_bytes
    if s.rests:
        return exact_bytes(s, costs)
    if s.lasting_bytes is None:
        return None
    need_bytes = costs.estimator.peak_bytes(s.plan, s.shape)
    return min(need_bytes + s.lasting_bytes, exact_bytes(s, costs) - spare_bytes)


def improves(plan: Plan, s: Snapshot, costs: PlanChooser) -> bool:
    """Whether a plan is better than the present one.

    It is if it lowers nothing, else if the policy predicts a smaller rise in NLL. Without a
    prediction, more bytes count as better.
    """
    tokens = s.shape.at_least_one[1]
    if plan == s.plan or lowers_nothing(plan, s.plan):
        return plan != s.plan
    rise, rise_before = (costs.rise(each, tokens) for each in (plan, s.plan))
    if rise is None or rise_before is None:
        peak_bytes = costs.estimator.peak_bytes
        return peak_bytes(plan, s.shape) > peak_bytes(s.plan, s.shape)
    return rise < rise_before


def lowers_nothing(plan: Plan, before: Plan) -> bool:
    """Whether no item has a lower level in a plan than it had before."""
    weights = [(level, before.weight_level(index)) for index, level in plan.weights]
    rank = WEIGHT_LEVELS.index
    return (
        plan.removed <= before.removed
        and all(rank(n) <= rank(old) for n, old in [*weights, (plan.embeddings, before.embeddings)])
        and all(
            2 * layer in before.removed or level.lowest(old := before.cache_level(layer)) == old
            for layer, level in plan.caches
        )
    )


# Bytes


def _fits(s: Snapshot, costs: PlanChooser) -> bool:
    return costs.fits(s.plan, s.shape, available_bytes(s, costs), s.floor)


def available_bytes(s: Snapshot, costs: PlanChooser) -> int:
    """Bytes that a plan may need for the batch, so that the next pass stays within the budget.

    That is the budget less the margin, as long as what is used now fits with all that the
    pass may allocate on top. If not, the process holds more besides its tensors than the
    margin covers, and that is counted instead. What is kept counts as free. What was borrowed
    for a row that runs is not for another one.
    """
    others_bytes = s.borrowed_bytes if s.joined is not None and not s.stalled else 0
    if s.progress.exact or is_crowded(s, costs):
        return exact_bytes(s, costs) - others_bytes
    return s.budget_bytes - s.margin_bytes - others_bytes


def exact_bytes(s: Snapshot, costs: PlanChooser) -> int:
    """As `available_bytes`, counting all measured memory besides tensors."""
    estimate = costs.estimator.pass_estimate(s.plan, s.shape, s.next_pass)
    excess_bytes = estimate.workspace - costs.estimator.workspace_bytes(s.shape)
    other_bytes = s.used_bytes - s.held_bytes
    return s.budget_bytes - max(s.margin_bytes, other_bytes + excess_bytes)


def is_crowded(s: Snapshot, costs: PlanChooser) -> bool:
    """Whether the next pass may exceed the budget by what is measured without what is kept."""
    most_bytes = costs.estimator.pass_estimate(s.plan, s.shape, s.next_pass).total
    return s.used_bytes - s.kept_bytes + most_bytes > s.budget_bytes


def _apply(plan: Plan, trigger: Trigger, s: Snapshot, costs: PlanChooser) -> tuple[Action, ...]:
    """Apply a plan, after what is kept made room for it."""
    freeing = _free_for(plan, replace(s, progress=replace(s.progress, freed=False)), costs)
    return freeing if freeing == (Trim(),) else (*freeing, Apply(plan, trigger))


def _free_for(
    plan: Plan, s: Snapshot, costs: PlanChooser, *, at_once: bool = True
) -> tuple[Action, ...]:
    """Free what is kept, as far as the batch with a plan needs it."""
    room_bytes = costs.estimator.room_for_kept(
        plan,
        s.shape,
        s.next_pass,
        budget_bytes=s.budget_bytes,
        margin_bytes=s.margin_bytes,
        needed_bytes=s.used_bytes - s.kept_bytes,
    )
    excess_bytes = s.kept_bytes - max(0, room_bytes)
    if excess_bytes <= 0 or s.progress.freed:
        return ()
    return (FreeKept(excess_bytes, at_once),) if s.progress.trimmed else (Trim(),)
