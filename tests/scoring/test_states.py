"""Kept states: what is shared, within the cap."""

import random

import torch

from rap_env.scoring.states import StateCache, branch_nodes

STEPS = tuple((block,) for block in range(8))
LOWS = [(1 << step[0]) - 1 for step in STEPS]


def state(number):
    return torch.full((4,), float(number))  # 16 bytes


def test_the_longest_unused_state_goes_first():
    cache = StateCache(48)
    for number in range(3):
        cache.put(0, (number, 0), state(number))
    assert cache.get(0, (0, 0)) is not None
    cache.put(0, (3, 0), state(3))
    assert [cache.get(0, (n, 0)) is None for n in range(4)] == [False, True, False, False]
    assert cache.held_bytes == 48


def test_batches_and_nodes_are_told_apart():
    cache = StateCache(1000)
    cache.put(0, (1, 0), state(1))
    cache.put(1, (1, 0), state(2))
    cache.put(0, (1, 1), state(3))
    cache.put(0, (1, 0), state(4))
    assert [cache.get(*key)[0] for key in ((0, (1, 0)), (1, (1, 0)), (0, (1, 1)))] == [4, 2, 3]
    assert cache.held_bytes == 48
    cache.clear()
    assert cache.get(0, (1, 0)) is None
    assert cache.held_bytes == 0


def test_nothing_is_kept_beyond_the_cap():
    cache = StateCache(15)
    cache.put(0, (0, 0), state(0))
    assert cache.get(0, (0, 0)) is None
    assert cache.held_bytes == 0


def test_branches_are_where_later_masks_leave():
    # 0b10 and 0b1000010 leave each other before block 6, 0b1 both before block 0.
    assert branch_nodes([0b10, 0b1000010, 0b1], STEPS) == {(6, 0b10), (0, 0)}
    assert branch_nodes([5], STEPS) == set()
    assert branch_nodes([], STEPS) == set()


def test_with_its_branches_kept_every_prefix_runs_once():
    draw = random.Random(0)
    for _ in range(50):
        masks = sorted({draw.getrandbits(8) for _ in range(12)}, key=lambda m: f"{m:08b}"[::-1])
        kept = branch_nodes(masks, STEPS)
        have, ran = set(), []
        for mask in masks:
            path = [(n, mask & low) for n, low in enumerate(LOWS)] + [(8, mask)]
            start = max((n for n, node in enumerate(path) if node in have), default=0)
            ran += path[start + 1 :]
            have |= kept & set(path)
        assert len(ran) == len(set(ran))
