"""All masks of small models, and the best of them by brute force."""

from itertools import combinations

from rap_env.plan import Plan
from tests.policies.requests import fits


def every_mask(num_blocks):
    """All plans that only remove blocks, those that remove few first."""
    for count in range(num_blocks + 1):
        yield from (Plan.removing(*chosen) for chosen in combinations(range(num_blocks), count))


def best_mask(context, request):
    """The mask of least NLL under which a request fits."""
    masks = every_mask(context.memory.facts.num_blocks)
    return min((m for m in masks if fits(context, m, request)), key=context.scorer.nll)
