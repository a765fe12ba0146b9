"""The report on stubs agrees with the rows of ``repair.jsonl``."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.comparison.loading import gather
from experiments.config import Config
from experiments.repair.figures import delta_nll_against_peak, ratio_against_tokens
from experiments.repair.report import repair_findings, repair_terminal_text
from experiments.repair.summaries import RepairComparison
from experiments.repair.tables import (
    domain_table,
    grid_caption,
    repair_accuracy_table,
    repair_grid_table,
    repair_markdown,
    repair_summary_table,
    repair_text_table,
    summary_caption,
    targets_table,
    token_table,
)
from experiments.report import report
from experiments.study.looks import look
from experiments.study.statistics import bootstrap_mean
from experiments.study.tables import TIMES
from rap_env.errors import ArtifactError
from tests.experiments.synthetic_records import (
    FIT_TEXTS,
    FITTED_RATIOS,
    OTHER_RATIOS,
    REPAIR_CELLS,
    REPAIR_TEXTS,
    make_repair_row,
    make_repair_rows,
    write_repair,
    write_root,
)

CELL = (1, 128, 0.9)


@pytest.fixture(scope="module")
def found():
    return RepairComparison(make_repair_rows())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = write_repair(tmp_path_factory.mktemp("runs") / "stubs")
    config = Config(stage="report", name="stubs", runs_dir=str(root.parent))
    return report(config, root / "report")


def test_ratios_are_of_means_over_the_grid(found):
    for summary in found.summaries:
        cells = np.mean(list(REPAIR_CELLS.values()))
        plain = np.mean([REPAIR_TEXTS[text] for text in FIT_TEXTS]) * cells
        assert summary.fitted.mean == pytest.approx(plain * FITTED_RATIOS[summary.repair])
        assert summary.fitted_ratio.mean == pytest.approx(FITTED_RATIOS[summary.repair])
        assert summary.other.mean == pytest.approx(1.4 * cells * OTHER_RATIOS[summary.repair])
        assert summary.other_ratio.mean == pytest.approx(OTHER_RATIOS[summary.repair])


def test_a_ratio_of_means_is_not_a_mean_of_ratios():
    loose, tight = CELL, (1, 128, 0.8)  # without stubs they lose 1.6 and 4.0
    rows = [make_repair_row("none", cell, "wiki") for cell in (loose, tight)]
    rows += [make_repair_row("library", loose, "wiki", ratio=1.0)]
    rows += [make_repair_row("library", tight, "wiki", ratio=0.5)]
    ratio = RepairComparison(rows).ratio_of("library", other=False)
    assert ratio.mean == pytest.approx((1.6 + 2.0) / (1.6 + 4.0))


def test_windows_are_paired():
    """Where each window is won back alike, hard windows make losses uncertain, but no ratio."""
    plain = make_repair_row("none", CELL, "wiki")
    halved = [loss / 2 for loss in plain.window_losses]
    stubs = make_repair_row("library", CELL, "wiki", window_losses=halved)
    summary = RepairComparison([plain, stubs]).summaries[1]
    assert summary.fitted.high - summary.fitted.low > 0.1
    assert (summary.fitted_ratio.low, summary.fitted_ratio.high) == pytest.approx((0.5, 0.5))


def test_the_interval_of_one_text_is_that_of_its_windows(found):
    row = found.at("library", CELL, "wiki")
    ours, theirs = found.delta_nll([row]), bootstrap_mean(row.window_losses)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((theirs.mean, theirs.low, theirs.high))


def test_an_uncertain_ratio_has_a_wide_interval(found):
    ratio = found.ratio_of("library", other=True)
    assert ratio.low < OTHER_RATIOS["library"] < ratio.high
    assert 0.005 < ratio.high - ratio.low < 0.2


def test_means_are_over_pairs_that_all_repairs_have():
    rows = [row for row in make_repair_rows() if row.study == "grid"]
    part = [row for row in rows if row.repair != "distilled" or row.budget_fraction == 0.9]
    found = RepairComparison(part)
    assert found.incomplete
    assert len(found.pairs) == 8
    assert found.summaries[0].other.mean == pytest.approx(1.4 * (1.0 + 0.8) / 2)
    assert "8 of 16 pairs" in summary_caption(found)
    assert "pairs" not in summary_caption(RepairComparison(rows))
    assert "-" in repair_grid_table(found)[1][1][2].split(" → ")


def test_without_a_loss_to_divide_by_there_is_no_ratio():
    free = [0.01, -0.02, 0.005]  # a mask that costs nothing
    rows = [make_repair_row(r, CELL, "wiki", window_losses=free) for r in ("none", "library")]
    found = RepairComparison(rows)
    assert found.ratio_of("library", other=False) is None
    assert repair_summary_table(found)[1][1][2] == "-"
    assert targets_table(found) is None
    alone = RepairComparison([make_repair_row("library", CELL, "wiki")])
    assert alone.summaries[0].fitted_ratio is None


def test_the_summary_table(found):
    header, rows = repair_summary_table(found)
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
    found = RepairComparison(rows)
    assert found.summaries[0].accuracy == pytest.approx(0.5)
    assert repair_accuracy_table(found) == (
        ["Repair", "task_one", "task_two", "mean"],
        [["Library", "40.0 %", "60.0 %", "50.0 %"]],
    )
    assert repair_accuracy_table(RepairComparison(rows[-1:])) is None
    dense = {"task_one": 0.6, "task_two": 0.9, "another": 0.1}
    _, lines = repair_accuracy_table(RepairComparison(rows, dense))
    assert lines[0] == ["Dense model", "60.0 %", "90.0 %", "75.0 %"]
    assert repair_accuracy_table(RepairComparison(rows, {"task_one": 0.6}))[1] == lines[1:]


def test_the_main_table_has_a_row_per_request_and_budget(found):
    header, rows = repair_grid_table(found)
    assert header == ["Request", "Budget", "self", "wiki", "code", "maths (not fitted on)",
                      "Blocks removed"]  # fmt: skip
    assert [row[:2] for row in rows] == [
        [f"1 {TIMES} 128", "90 % (235 MiB)"], [f"1 {TIMES} 128", "80 % (209 MiB)"],
        [f"8 {TIMES} 2,048", "90 % (573 MiB)"], [f"8 {TIMES} 2,048", "80 % (510 MiB)"],
    ]  # fmt: skip
    assert rows[0][3] == "1.60 → 0.88 → 0.64 → 0.56"
    assert rows[0][5] == "1.40 → 0.98 → 0.91 → 0.84"
    assert rows[0][6] == "3+4 → 4+4 → 4+4 → 4+4"
    assert "No stubs → Library → Distilled library → Fitted per mask" in grid_caption(found)


def test_a_mask_over_its_budget_is_marked():
    row = make_repair_row("none", CELL, "wiki")
    found = RepairComparison([replace(row, peak_bytes=row.budget_bytes + 1)])
    assert repair_summary_table(found)[1][0][-1] == "0/1"
    assert repair_text_table(found, "wiki")[1][0][-1].endswith("MiB (does not fit)")


def test_the_token_study_ends_with_the_whole_library(found):
    header, rows = token_table(found)
    assert header[0] == "Fitting tokens"
    assert [row[0] for row in rows] == ["16,384", "65,536", "262,144"]
    assert [row[2][:4] for row in rows] == ["0.85", "0.65", "0.55"]
    assert [row[4][:4] for row in rows] == ["1.00", "0.80", "0.70"]


def test_domains_are_compared_with_the_grid_cell_by_cell(found):
    header, rows = domain_table(found)
    assert header == ["Fitted on", "Tokens", *REPAIR_TEXTS]
    shares = {row[0]: [cell[:4] for cell in row[2:]] for row in rows}
    assert shares == {
        "self": ["0.50", "0.75", "0.75", "0.75"],
        "wiki": ["0.90", "0.50", "0.90", "0.90"],
        "code": ["0.90", "0.90", "0.50", "0.90"],
        "self + wiki + code": ["0.55", "0.55", "0.55", "0.70"],
    }
    part = [row for row in make_repair_rows() if row.repair != "none" or row.cell == CELL]
    alone = RepairComparison(part)
    own = [row for row in alone.study("domain") if row.fitted_on == ["self"]]
    assert alone.ratio(own).mean == pytest.approx((0.5 * 0.8 + 0.75 * 4.2) / 5.0), "one cell alone"


def test_targets_are_compared_with_reached_values(found):
    header, rows = targets_table(found)
    assert header == ["Ratio to no stubs", "Measured", "Target", "Met"]
    assert [(row[0], row[1][:4], row[2], row[3]) for row in rows] == [
        ("library against plain, texts not fitted on", "0.70", "at most 0.75", "yes"),
        ("distilled, texts not fitted on", "0.65", "at most 0.6", "no"),
        ("library, held-out text of a fitted domain", "0.55", "at most 0.6", "yes"),
        ("fitted on self-written text alone, worst text", "0.75", "at most 0.8", "yes"),
    ]


def test_a_target_without_rows_is_omitted():
    rows = [r for r in make_repair_rows() if r.repair != "distilled" and r.study == "grid"]
    goals = [row[0] for row in targets_table(RepairComparison(rows))[1]]
    assert len(goals) == 2
    assert all(goal.startswith("library") for goal in goals)
    fitted = [row for row in rows if row.text != "maths"]
    assert len(targets_table(RepairComparison(fitted))[1]) == 1


def test_the_last_row_of_the_same_counts():
    rows = [make_repair_row(r, CELL, "wiki") for r in ("none", "library")]
    again = make_repair_row("library", CELL, "wiki", ratio=0.25)
    assert len(RepairComparison([*rows, again]).rows) == 2
    ratio = RepairComparison([*rows, again]).ratio_of("library", other=False)
    assert ratio.mean == pytest.approx(0.25)


def test_rows_that_do_not_compare_are_rejected():
    row = make_repair_row("none", CELL, "wiki")
    other = {"model_fingerprint": "e" * 64, "calibration_sha256": "a" * 64, "report_sha256": "wiki"}
    changes = {
        "differ in model_fingerprint": {"provenance": {"depends_on": other}},
        "differ in number of windows of the text 'wiki'": {"window_losses": [1.0]},
    }
    for words, change in changes.items():
        with pytest.raises(ArtifactError, match=words):
            RepairComparison([row, make_repair_row("library", CELL, "wiki", **change)])
    with pytest.raises(ArtifactError, match=r"run `python -m experiments\.repair`"):
        RepairComparison([])


def test_the_terminal_text_fits(found):
    text = repair_terminal_text(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "0.55 [" in text
    assert "nats/token" in text
    assert "distilled, texts not fitted on" in text


def test_the_figure_shows_each_row_of_the_grid(found):
    for narrow in (False, True):
        figure = delta_nll_against_peak(found, narrow)
        drawn = {
            (line.get_label(), round(x * 2**20), round(y, 6))
            for axis in figure.axes
            for line in axis.get_lines()
            for x, y in zip(*line.get_data(), strict=True)
        }
        assert drawn == {
            (look(row.repair).label, row.peak_bytes, round(row.loss, 6))
            for row in found.study("grid")
        }
        assert len(figure.axes) == 8, "a panel a text and request"
        assert len({axis.get_ylim() for axis in figure.axes}) == 1
    titles = [axis.get_title("left") for axis in delta_nll_against_peak(found, False).axes[:4]]
    assert titles[0] == "self\nfitted domain"
    assert titles[3] == "maths\nnot fitted on"


def test_a_mask_over_its_budget_is_hollow():
    row = make_repair_row("none", CELL, "wiki")
    for peak, marks in ((row.budget_bytes, 0), (row.budget_bytes + 1, 1)):
        found = RepairComparison([replace(row, peak_bytes=peak)])
        lines = delta_nll_against_peak(found, False).axes[0].get_lines()
        assert sum(line.get_markerfacecolor() == "white" for line in lines) == marks


def test_the_token_figure_has_a_line_per_text(found):
    axis = ratio_against_tokens(found, False).axes[0]
    lines = {c.get_label(): c.lines[0].get_data() for c in axis.containers}
    assert list(lines) == ["self", "wiki", "code", "maths (not fitted on)"]
    assert list(lines["maths (not fitted on)"][0]) == [16_384, 65_536, 262_144]
    assert lines["maths (not fitted on)"][1] == pytest.approx([1.0, 0.8, 0.7])
    assert axis.get_xscale() == "log"


@pytest.mark.slow
def test_a_page_on_stubs_is_made_from_rows_alone(page):
    text = page.read_text()
    assert "A stub is a small module" in text
    assert "smollm2-135m" in text
    assert "Figure 2" in text
    assert "Provenance" in text
    assert "What fills the memory" not in text
    assert "results.jsonl" not in text
    names = {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert names == {"repair_delta_nll_against_peak", "repair_ratio_against_tokens"}
    assert not (page.parent / "tables.md").exists()


def test_the_tables_are_written_next_to_the_page(page, found):
    text = (page.parent / "repair_tables.md").read_text()
    assert text == repair_markdown(found)
    assert "| 16,384 | 0.85 [" in text
    assert text.count("masks that the search with the whole library chose") == 2


def test_the_findings_agree_with_the_numbers(page):
    texts = repair_findings(gather(page.parent.parent))
    assert len(texts) == 3
    assert texts[0].startswith("Library: of the ΔNLL without stubs at equal memory, 0.55 [")
    assert "0.70 [" in texts[0]


@pytest.mark.slow
def test_the_repair_section_is_added_to_the_other_sections(tmp_path):
    root = write_repair(write_root(tmp_path / "both"))
    text = report(
        Config(stage="report", name="both", runs_dir=str(tmp_path)), root / "report"
    ).read_text()
    assert '<section id="comparison">' in text
    assert '<section id="repair">' in text
    assert "evaluate/results.jsonl" in text
    assert "repair/repair.jsonl" in text
    assert (root / "report" / "tables.md").exists()
    assert (root / "report" / "repair_tables.md").exists()


def test_a_small_run_gives_a_page(tmp_path):
    """One cell, one text, no stubs, no studies, no note of the run."""
    folder = tmp_path / "small" / "repair"
    folder.mkdir(parents=True)
    record = make_repair_row("none", CELL, "wiki", accuracies={}).to_record()
    (folder / "repair.jsonl").write_text(json.dumps(record) + "\n")
    config = Config(stage="report", name="small", runs_dir=str(tmp_path))
    text = report(config, tmp_path / "small" / "report").read_text()
    assert "1 cell (a request at a budget) and 1 text." in text
    assert "Targets" not in text
