"""Tables and figures of plans at budgets that differ between requests, from invented records."""

from dataclasses import replace

import pytest

from experiments.comparison import result_figures
from experiments.comparison.result_figures import LevelsLine, levels_picture
from experiments.comparison.result_tables import (
    budget_words,
    delta_nll_table,
    ratio_table,
    removed_table,
    target_table,
    terminal_text,
    tight_document,
)
from experiments.comparison.summaries import Comparison
from experiments.study.plotting import svg_uri
from experiments.study.table_format import shape_words
from rap_env.plan import Plan
from tests.experiments.synthetic_records import LAYERS, make_row

BUDGETS = {(1, 128): (0.9, 0.8), (8, 2048): (0.5, 0.3), (16, 4096): (0.4, 0.2)}
TARGETS = (0.1, 1.0)
FACTORS = {"uniform": 1.0, "knapsack": 0.8, "rap": 0.5}


def tight_row(method, shape, budget, target):
    factor = 0.0 if method == "dense" else FACTORS[method]
    plan = Plan.uniform(LAYERS, caches="int4", embeddings="int4")
    plan = plan.lower({"layer03.ffn": "removed", "layer04.attn": "removed"})
    row = make_row(method, shape, budget, target_delta_nll=target, levels=plan.levels)
    losses = [factor * target * (1 + 0.02 * number) for number in range(16)]
    return replace(
        row, window_delta_nll=losses, mask=list(plan.removed_names), attn_removed=1, ffn_removed=1
    )


@pytest.fixture(scope="module")
def comparison():
    return Comparison(
        [
            tight_row(method, shape, budget, target)
            for method in ("dense", *FACTORS)
            for shape, budgets in BUDGETS.items()
            for budget, target in zip(budgets, TARGETS, strict=True)
        ]
    )


def test_budgets_belong_to_their_requests(comparison):
    assert comparison.budgets_of((8, 2048)) == [0.5, 0.3]
    assert not comparison.same_budgets
    assert {target: len(cells) for target, cells in comparison.targets.items()} == {0.1: 3, 1.0: 3}
    assert budget_words(comparison) == "2 for each request, from 20 % to 90 %"
    header, rows = delta_nll_table(comparison, (8, 2048))
    assert len(header) == 3
    assert header[1].startswith("about 0.1 (")
    assert all(all(row) for row in rows)


def test_ratios_are_by_request_by_target_and_over_all(comparison):
    header, rows = ratio_table(comparison, "uniform")
    assert header == ["Method", *map(shape_words, BUDGETS), "about 0.1", "about 1", "All"]
    values = {row[0]: row[1:] for row in rows}
    assert set(values) == {"RAP policy", "Knapsack"}
    assert set(values["RAP policy"]) == {"0.50 [0.50, 0.50]"}
    assert set(values["Knapsack"]) == {"0.80 [0.80, 0.80]"}
    titles = [table.title for table in tight_document(comparison)]
    assert titles[1:] == [
        "ΔNLL divided by that of Uniform settings", "ΔNLL divided by that of Knapsack",
    ]  # fmt: skip


def test_losses_are_shown_by_target(comparison):
    header, rows = target_table(comparison)
    assert header == ["Method", *map(shape_words, BUDGETS), "about 0.1", "about 1", "All"]
    # The mean over windows is 1.15 times the target, and the policy loses half of that.
    assert rows[0] == ["RAP policy", *["0.316"] * 3, "0.058", "0.575", "0.316"]


def test_plans_are_shown_with_their_levels(comparison):
    _, rows = removed_table(comparison, (1, 128))
    assert all(cell.startswith("1 + 1, int4, embeddings int4, ") for cell in rows[0][1:])
    text = terminal_text(comparison)
    assert "Evals: plans" in text
    assert max(map(len, text.splitlines())) <= 100


def test_masks_at_equal_budgets_have_no_such_tables():
    rows = [make_row(m, (1, 128), b) for m in ("dense", "gsi", "knapsack") for b in (0.9, 0.8)]
    plain = Comparison(rows)
    assert tight_document(plain) == []
    assert not plain.has_levels
    assert budget_words(plain) == "90 %, 80 %"


def test_figures_are_drawn(comparison):
    rows = [row for row in comparison.rows if row.method == "rap" and row.shape != (8, 2048)]
    lines = [
        LevelsLine(row.shape, f"{shape_words(row.shape)} ~{row.target_delta_nll}", row.levels)
        for row in rows
    ]
    figure = levels_picture(lines, LAYERS)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["Attention", "KV caches", "FFN", "Emb."]
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["native", "int4", "removed"]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4
    other = LevelsLine((1, 128), "other", {"layer00.cache": "int8-window320"})
    (legend,) = levels_picture([*lines, other], LAYERS).legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[-1] == "int8-window320", "a level without a colour of its own"
    assert labels[0].startswith(shape_words((1, 128)))
    assert "~0.1" in labels[0]
    assert svg_uri(figure).startswith("data:image/svg+xml")
    lines = result_figures.delta_nll_against_budget(comparison)
    for axis, budgets in zip(lines.axes, BUDGETS.values(), strict=False):
        left, right = axis.get_xlim()
        assert left > 100 * max(budgets) > 100 * min(budgets) > right
