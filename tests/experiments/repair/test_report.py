"""Tables, figure and report of repair agree with the rows."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.repair.rows import RepairComparison, mean_delta_nll
from experiments.repair.tables import repair_tables
from experiments.study.looks import look
from experiments.study.tables import TIMES
from tests.experiments.synthetic_records import (
    FIT_TEXTS,
    FITTED_RATIOS,
    OTHER_RATIOS,
    REPAIR_CELLS,
    REPAIR_TEXTS,
    make_repair_row,
    make_repair_rows,
)

CELL = (1, 128, 0.9)


def tables(data):
    """All tables by the first word of their titles."""
    return {part.title.partition(" ")[0]: part.table for part in repair_tables(data)}


@pytest.fixture(scope="module")
def found():
    return RepairComparison(make_repair_rows())


@pytest.mark.parametrize("repair", FITTED_RATIOS)
def test_ratios_are_of_means_over_the_grid(found, repair):
    cells = np.mean(list(REPAIR_CELLS.values()))
    plain = np.mean([REPAIR_TEXTS[text] for text in FIT_TEXTS]) * cells
    for other, ratios, mean in ((False, FITTED_RATIOS, plain), (True, OTHER_RATIOS, 1.4 * cells)):
        rows = found.on(repair, other=other)
        assert mean_delta_nll(rows).mean == pytest.approx(mean * ratios[repair])
        assert found.ratio(rows).mean == pytest.approx(ratios[repair])


def test_a_ratio_of_means_is_not_a_mean_of_ratios():
    loose, tight = CELL, (1, 128, 0.8)  # without stubs they lose 1.6 and 4.0
    rows = [make_repair_row("none", cell, "wiki") for cell in (loose, tight)]
    rows += [make_repair_row("library", loose, "wiki", ratio=1.0)]
    rows += [make_repair_row("library", tight, "wiki", ratio=0.5)]
    ratio = RepairComparison(rows).ratio(rows[2:])
    assert ratio.mean == pytest.approx((1.6 + 2.0) / (1.6 + 4.0))


def test_windows_are_paired():
    """Where each window is won back alike, hard windows make losses uncertain, but no ratio."""
    plain = make_repair_row("none", CELL, "wiki")
    halved = [loss / 2 for loss in plain.window_losses]
    stubs = make_repair_row("library", CELL, "wiki", window_losses=halved)
    data = RepairComparison([plain, stubs])
    delta_nll, ratio = mean_delta_nll([stubs]), data.ratio(data.on("library", other=False))
    assert delta_nll.high - delta_nll.low > 0.1
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5))


def test_without_a_loss_to_divide_by_there_is_no_ratio():
    free = [0.01, -0.02, 0.005]  # a mask that costs nothing
    rows = [make_repair_row(r, CELL, "wiki", window_losses=free) for r in ("none", "library")]
    found = RepairComparison(rows)
    assert found.ratio(found.on("library", other=False)) is None
    assert tables(found)[""][1][1][2] == "-"
    alone = RepairComparison([make_repair_row("library", CELL, "wiki")])
    assert alone.ratio(alone.rows) is None


def test_the_summary_table(found):
    header, rows = tables(found)[""]
    assert [row[0] for row in rows] == [look(repair).label for repair in FITTED_RATIOS]
    assert rows[0][1:5] == ["1.950", "1", "2.275", "1"]
    assert header[5:] == ["Accuracy", "Tokens", "Fits"]
    assert rows[1][5:] == ["64.8 %", "262,144", "4/4"], "(74.5 + 55) / 2"
    assert rows[1][2].startswith("0.55 [")
    assert rows[1][4].startswith("0.70 [")


def test_accuracies_are_per_cell_and_independent_of_the_text():
    rows = []
    for cell, right in ((CELL, 0.5), ((1, 128, 0.8), 0.3)):
        for text in ("wiki", "code", "maths"):
            given = {"task_one": right, "task_two": right + 0.2}
            rows.append(make_repair_row("library", cell, text, accuracies=given))
    rows.append(make_repair_row("library", (8, 2048, 0.9), "wiki", accuracies={}))
    assert tables(RepairComparison(rows))["Accuracy"] == (
        ["Repair", "task_one", "task_two", "mean"],
        [["Library", "40.0 %", "60.0 %", "50.0 %"]],
    )
    assert "Accuracy" not in tables(RepairComparison(rows[-1:]))
    dense = {"task_one": 0.6, "task_two": 0.9}
    with_dense = [replace(row, dense_accuracies=dense) for row in rows]
    _, lines = tables(RepairComparison(with_dense))["Accuracy"]
    assert lines[0] == ["Dense model", "60.0 %", "90.0 %", "75.0 %"]


def test_the_main_table_has_a_row_per_request_and_budget(found):
    header, rows = tables(found)["ΔNLL"]
    assert header == ["Request", "Budget", "self", "wiki", "code", "maths (not fitted on)",
                      "Blocks removed"]  # fmt: skip
    assert [row[:2] for row in rows] == [
        [f"1 {TIMES} 128", "90 % (235 MiB)"], [f"1 {TIMES} 128", "80 % (209 MiB)"],
        [f"8 {TIMES} 2,048", "90 % (573 MiB)"], [f"8 {TIMES} 2,048", "80 % (510 MiB)"],
    ]  # fmt: skip
    assert rows[0][3] == "1.60 → 0.88"
    assert rows[0][5] == "1.40 → 0.98"
    assert rows[0][6] == "3+4 → 4+4"
    assert "No stubs → Library" in repair_tables(found)[1].caption
