"""A policy that needs no measured costs: the same level for all items, then whole blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.base import Policy
from rap_env.request import Request


class UniformPolicy(Policy):
    """Chooses the first of some plans that fits, else the last one with blocks removed in an order.

    Args:
        memory: The model's byte arithmetic.
        plans: Plans from the most to the least exact one, such as `uniform_plans`.
        order: Indices of blocks in the order in which they are removed.
        name: The policy's name.

    Raises:
        UnknownNameError: The model does not have an item or a level of a plan, or a block of the
            order.
    """

    lowers = True
    order: tuple[int, ...]

    def __init__(
        self,
        memory: MemoryModel,
        plans: Sequence[Plan],
        order: Iterable[int] = (),
        name: str = "uniform",
    ) -> None:
        self.name = name
        self.memory = memory
        self.order = tuple(order)
        self._plans = tuple(map(memory.check_plan, plans))
        Plan.removing(*self.order).check(memory.facts.num_blocks)

    def choose(self, request: Request) -> Plan:
        """Return the most exact plan that fits, or the smallest one if none does."""
        plan = self._plans[-1]
        for plan in self._plans:
            if self._fits(plan, request):
                return plan
        for index in self.order:
            plan = plan.without(index)
            if self._fits(plan, request):
                break
        return plan

    def _fits(self, plan: Plan, request: Request) -> bool:
        return self.memory.peak_bytes(plan, request) <= request.budget_bytes


def uniform_plans(facts: ModelFacts) -> list[Plan]:
    """Uniform plans of a model from native down: caches first, since they cost least, then weights.

    Levels that some block does not have are left native there.
    """
    layers, found = facts.num_layers, [Plan()]
    if facts.kv_heads:
        found += [Plan.uniform(layers, caches=level) for level in ("int8", "int4")]
    for level in ("int8", "int4"):
        names = facts.blocks_at(level)
        if "int8" in facts.embedding_levels:
            names[EMBEDDINGS] = "int8"
        if names:
            found.append(found[-1].lower(names))
    return found


def middle_first(num_layers: int) -> list[int]:
    """An order of removal without measurements: from the layer before the last one to the first.

    The last layer and the first two matter most in most models (Men et al. 2024, ShortGPT), so
    they come last.
    """
    ends = [layer for layer in (num_layers - 1, 1, 0) if 0 <= layer < num_layers]
    middle = [layer for layer in reversed(range(num_layers)) if layer not in ends]
    layers = [*middle, *dict.fromkeys(ends)]
    return [index for layer in layers for index in (2 * layer, 2 * layer + 1)]
