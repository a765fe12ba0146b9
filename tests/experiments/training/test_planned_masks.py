"""The mix of masks that a table measures."""

from itertools import islice

from experiments.score_model import planned_masks
from rap_env.plan import Plan

BLOCKS = 60
ORDERS = [list(range(BLOCKS)), list(range(BLOCKS))[::-1]]


def first(number, orders=ORDERS, seed=0):
    return list(islice(planned_masks(BLOCKS, orders, seed), number))


def test_masks_are_unique_and_in_a_fixed_order():
    masks = first(3000)
    assert len(set(masks)) == 3000
    assert masks == first(3000)
    assert masks[:1000] == first(1000)
    assert set(first(3000, seed=1)) != set(masks)


def test_the_dense_model_and_every_single_removal_come_first():
    masks = first(64)
    assert masks[0] == Plan()
    assert {len(mask.removed) for mask in masks[1:61]} == {1}
    assert [len(mask.removed) for mask in masks[61:]] == [30, 30, 60]
