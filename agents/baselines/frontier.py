"""A look-up in the table of the best known masks."""

from __future__ import annotations

from agents.baselines.base import Baseline, fits
from agents.baselines.bench import Bench
from agents.baselines.orders import GSIBaseline
from rap_env.blocks import BlockMask
from rap_env.request import Request


class FrontierBaseline(Baseline):
    """The known mask of least loss under which the request fits; no evaluation, no network.

    Where no known mask fits it follows the GSI order.

    Raises:
        ArtifactError: No known mask fits, and the context has no GSI order.
    """

    name = "frontier"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._context = context
        self._frontier = context.frontier

    @property
    def setup_evaluations(self) -> int:
        """Masks that were scored to build the table."""
        return self._frontier.evaluations

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        if fits(self.memory, BlockMask(), request):
            return BlockMask(), 0
        found = self._frontier.best(self.memory, request)
        if found is None:
            found = GSIBaseline(self._context).select(request).mask
        return found, 0
