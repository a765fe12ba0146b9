"""The plans that also remove one of the blocks that a plan keeps."""

from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer


def removals(num_blocks: int, base: Plan) -> dict[int, Plan]:
    """By the block that each one removes."""
    return {n: base.without(n) for n in range(num_blocks) if n not in base.removed}


def scan(scorer: MaskScorer, base: Plan) -> dict[int, float]:
    """NLL of these plans, by the block."""
    plans = removals(scorer.llm.num_blocks, base)
    return dict(zip(plans, scorer.nll_many(list(plans.values())), strict=True))
