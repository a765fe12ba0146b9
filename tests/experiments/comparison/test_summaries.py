"""Summaries of methods: their order, and what means are over."""

import pytest

from experiments.comparison.summaries import Comparison
from rap_env.errors import ArtifactError
from tests.experiments.synthetic_records import FACTORS, make_rows


@pytest.fixture(scope="module")
def comparison():
    return Comparison(make_rows())


def test_methods_are_sorted_by_loss_with_unmet_budgets_last(comparison):
    order = [summary.method for summary in comparison.summaries]
    fair = [method for method in FACTORS if method != "attention_only"]
    assert order[:-1] == sorted(fair, key=FACTORS.__getitem__)
    assert order[-1] == "attention_only"
    assert not comparison.summaries[-1].fits_all


def test_a_mean_is_over_cells_that_all_methods_have():
    rows = make_rows()
    rows = [r for r in rows if not (r.method == "gsi" and r.budget_fraction == 0.7)]
    compared = Comparison(rows)
    assert {cell[2] for cell in compared.cells} == {0.9, 0.8}
    whole = next(s for s in Comparison(make_rows()).summaries if s.method == "knapsack")
    part = next(s for s in compared.summaries if s.method == "knapsack")
    assert part.delta_nll.mean < whole.delta_nll.mean, "the tightest budget is left out for all"


def test_without_rows_there_is_no_comparison():
    with pytest.raises(ArtifactError, match=r"run `python -m experiments\.evaluate`"):
        Comparison([])
