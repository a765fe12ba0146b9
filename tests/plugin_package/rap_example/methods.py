"""A method: derives from `Method`; it is compared, served and exported by its name."""

from rap_env.plan import Plan
from rap_env.policies.method import CountingScorer, Method
from rap_env.request import Request


class LargestFirst(Method):
    """Removes the blocks that free most bytes; scores nothing."""

    name = "largest_first"

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        freed = self.memory.freed_bytes(request)
        order = sorted(range(len(freed)), key=lambda block: -freed[block])
        return self.remove([(block,) for block in order], request)
