"""Infos of fixed shape, for frameworks that stack them."""

import numpy as np
import pytest

from rap_env.plan import Plan
from tests.envs.playing import (
    COUNT,
    ITEMS,
    MODES,
    assert_same,
    make,
    make_v1,
    play,
    play_vector,
)


def test_removed_blocks_as_an_array_have_a_fixed_shape(context):
    named, arrays = make(context), make(context, info="arrays")
    for seed in range(4):
        expected, found = play(named, seed), play(arrays, seed)
        removed = np.stack([step[-1]["removed"] for step in found])
        assert removed.dtype == np.int8
        assert removed.shape == (len(found), COUNT)
        for flags, step in zip(removed, expected, strict=True):
            assert Plan.removing(*np.flatnonzero(flags)) == Plan.removing(*step[-1]["removed"])
        for step in (*expected, *found):
            del step[-1]["removed"]
        assert_same(found, expected)  # nothing else differs
    first, _ = arrays.reset(seed=0)
    _, info = arrays.reset(seed=0)
    info["removed"][:] = 1  # a copy
    assert_same(arrays.reset(seed=0)[0], first)


def test_levels_as_an_array_have_a_fixed_shape(ladder):
    named, arrays = make_v1(ladder), make_v1(ladder, info="arrays")
    names = named.ladder.level_names
    for seed in range(4):
        for step, other in zip(play(named, seed), play(arrays, seed), strict=True):
            levels = other[-1]["levels"]
            assert (levels.dtype, levels.shape) == (np.int8, (ITEMS,))
            read = [names[item][level] for item, level in enumerate(levels)]
            assert read == step[-1]["levels"]


@pytest.mark.parametrize("mode", MODES)
def test_vector_environments_have_those_of_single_ones(task, mode):
    vector = task.make_vector(autoreset_mode=mode, info="arrays")
    assert_same(play_vector(vector, 0), play_vector(task.make_sync(mode, info="arrays"), 0))
