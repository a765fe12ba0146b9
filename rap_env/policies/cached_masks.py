"""The packaged policy over masks, on a base whose caches are stored in fewer bits."""

from __future__ import annotations

from rap_env.plan import Plan
from rap_env.policies.method import CountingScorer, Method
from rap_env.policies.network_policy import NetworkPolicy, packaged_network
from rap_env.policies.registry import register
from rap_env.request import Request


@register
class MasksOnLoweredCaches(Method):
    """The packaged policy of `RAPPrune-v0`, which removes blocks, on int8 caches.

    The policy sees the bytes of the int8 caches. Where the request does not fit even with every
    block removed, the caches are int4. Over masks the caches stay native.

    Raises:
        ArtifactError: The policy is not for a model of this shape.
    """

    name = "rap-v0"

    def _prepare(self) -> None:
        file, layers = packaged_network(self.name), self.memory.facts.num_layers
        levels = ("native",) if self.removes_only else ("int8", "int4")
        bases = [Plan.uniform(layers, caches=level) for level in levels]
        self._policies = [(NetworkPolicy(self.memory, file, base=base), base) for base in bases]

    def _choose(self, request: Request, scores: CountingScorer) -> Plan:
        for policy, base in self._policies:
            costs = policy.encoder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
            if costs.least_peak_bytes <= request.budget_bytes:
                return base.without(*policy.choose(request).removed)
        return base.without(*range(self.memory.facts.num_blocks))
