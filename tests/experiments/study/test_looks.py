import itertools

import pytest
from matplotlib.colors import to_rgb

from experiments.study.plotting import look, rank
from rap_env.policies.registry import methods

MASK_METHODS = sorted(
    set(methods()) - {"uniform", "score_model", "rap-v0", "greedy_per_byte-exact"}
)
METHODS = ("rap", "maskable_ppo", "ppo", "masked_dqn", "dqn", *MASK_METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_distinct_style(method):
    shown = look(method)
    assert shown.label != method
    assert shown.what != "no description"
    assert shown.learned == (method not in MASK_METHODS)


def test_colours_can_be_told_apart():
    colours = {method: to_rgb(look(method).colour) for method in METHODS}
    for a, b in itertools.combinations(METHODS, 2):
        apart = sum((x - y) ** 2 for x, y in zip(colours[a], colours[b], strict=True)) ** 0.5
        assert apart > 0.15, (a, b)


def test_learned_methods_come_first_and_dense_last():
    ranks = {method: rank(method) for method in METHODS}
    assert min(METHODS, key=ranks.get) == "rap"
    assert max(METHODS, key=ranks.get) == "dense"
    assert len(set(ranks.values())) == len(METHODS)
    assert rank("rap-no_warm_start") == rank("rap")
