"""Ranks go where they save most, within a sum."""

import itertools

import numpy as np
import pytest

from rap_env.repair.regression import allocate_ranks


def total_loss(losses, choices, ranks) -> float:
    return sum(curve[choices.index(ranks[block])] for block, curve in losses.items())


def best_loss(losses, choices, total) -> float:
    """The least loss of all ways to give ranks."""
    blocks = list(losses)
    ways = itertools.product(choices, repeat=len(blocks))
    fitting = [dict(zip(blocks, way, strict=True)) for way in ways if sum(way) <= total]
    return min(total_loss(losses, choices, ranks) for ranks in fitting)


def falling(seed: int, blocks: int, choices: list[int]) -> dict[int, list[float]]:
    """Loss curves with diminishing returns."""
    rng = np.random.default_rng(seed)
    return {
        block: list(rng.uniform(0.5, 2) * np.exp(-np.array(choices) * rng.uniform(0.05, 0.5)))
        for block in range(blocks)
    }


@pytest.mark.parametrize("seed", range(8))
def test_with_steps_of_one_size_nothing_of_the_sum_is_better(seed: int) -> None:
    choices = [0, 2, 4, 6]
    losses = falling(seed, 4, choices)
    for total in (0, 2, 8, 14, 24, 100):
        ranks = allocate_ranks(losses, choices, total)
        assert sum(ranks.values()) <= total
        assert total_loss(losses, choices, ranks) == pytest.approx(
            best_loss(losses, choices, total), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(8))
def test_with_uneven_steps_it_loses_less_than_one_step(seed: int) -> None:
    choices = [0, 1, 2, 4, 8]
    losses = falling(seed, 4, choices)
    for total in (5, 11, 20):
        ranks = allocate_ranks(losses, choices, total)
        assert sum(ranks.values()) <= total
        even = dict.fromkeys(losses, max(c for c in choices if 4 * c <= total))
        found = total_loss(losses, choices, ranks)
        assert best_loss(losses, choices, total) <= found
        assert found <= total_loss(losses, choices, even) + 1e-12


def test_a_block_that_gains_nothing_stays_at_the_least() -> None:
    losses = {5: [1.0, 1.0, 1.1], 6: [1.0, 0.5, 0.4]}
    assert allocate_ranks(losses, [0, 8, 16], 100) == {5: 0, 6: 16}


def test_a_plateau_is_stepped_over() -> None:
    losses = {0: [1.0, 1.0, 0.2], 1: [1.0, 0.9, 0.85]}
    assert allocate_ranks(losses, [0, 1, 2], 2) == {0: 2, 1: 0}


def test_every_block_gets_the_least_rank() -> None:
    losses = {0: [1.0, 0.5], 1: [1.0, 0.9]}
    assert allocate_ranks(losses, [4, 8], 8) == {0: 4, 1: 4}
    assert allocate_ranks(losses, [4, 8], 12) == {0: 8, 1: 4}
