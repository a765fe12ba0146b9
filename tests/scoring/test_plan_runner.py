"""The prefix tree of masks and the cache of its states."""

import random

import torch

from rap_env.plan import Plan
from rap_env.scoring.plan_runner import StateCache, branch_nodes, plan_prefixes

STEPS = tuple((block,) for block in range(8))
DENSE = Plan()


def state(number):
    return torch.full((4,), float(number))  # 16 bytes


def test_the_least_recently_used_state_is_evicted_first():
    cache = StateCache(48)
    for number in range(3):
        cache.put(0, (number, DENSE), state(number))
    assert cache.get(0, (0, DENSE)) is not None
    cache.put(0, (3, DENSE), state(3))
    assert [cache.get(0, (n, DENSE)) is None for n in range(4)] == [False, True, False, False]
    assert cache.held_bytes == 48


def test_a_part_of_a_batch_does_not_keep_the_batch():
    """Several plans run in one batch, and few of their states are kept."""
    batch = torch.arange(64.0).reshape(16, 4)
    cache = StateCache(48)
    for number, part in enumerate(torch.split(batch, 1)):
        cache.put(0, (number, DENSE), part)
    kept = [cache.get(0, (number, DENSE)) for number in range(13, 16)]
    assert [list(one[0]) for one in kept] == batch[13:].tolist()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    assert sum(held.values()) == cache.held_bytes == 48


def test_branches_are_where_later_masks_leave():
    first, second, third = Plan.removing(1), Plan.removing(1, 6), Plan.removing(0)
    # The first two leave each other before block 6, the third leaves both before block 0.
    assert branch_nodes([first, second, third], STEPS) == {(6, first), (0, DENSE)}
    assert branch_nodes([Plan.removing(0, 2)], STEPS) == set()
    assert branch_nodes([], STEPS) == set()


def test_with_its_branches_kept_every_prefix_runs_once():
    draw = random.Random(0)
    for _ in range(50):
        rows = sorted({tuple(draw.getrandbits(1) for _ in range(8)) for _ in range(12)})
        masks = [Plan.removing(*(i for i, bit in enumerate(row) if bit)) for row in rows]
        kept = branch_nodes(masks, STEPS)
        have, ran = set(), []
        for mask in masks:
            path = list(enumerate(plan_prefixes(mask, STEPS)))
            start = max((n for n, node in enumerate(path) if node in have), default=0)
            ran += path[start + 1 :]
            have |= kept & set(path)
        assert len(ran) == len(set(ran))
