"""A policy: a callable that takes the byte arithmetic of a model, and has `choose(request)`."""

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request


class LargestFirst:
    """Removes the blocks that free most bytes for the request, until it fits."""

    name = "largest"

    def __init__(self, memory: MemoryModel) -> None:
        self.memory = memory

    def choose(self, request: Request) -> Plan:
        """Return the blocks to remove."""
        freed = self.memory.freed_bytes(request)
        order = sorted(range(len(freed)), key=lambda block: -freed[block])
        plan = Plan()
        for block in order:
            if self.memory.peak_bytes(plan, request) <= request.budget_bytes:
                break
            plan = plan.without(block)
        return plan
