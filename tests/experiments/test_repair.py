"""The repair program on a tiny real model, and tables and ratios of made-up rows."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.config.common import TextConfig
from experiments.config.evaluation_settings import EvaluateConfig
from experiments.config.study_settings import StubsConfig
from experiments.repair import (
    STUDY,
    RepairComparison,
    RepairRow,
    RepairStudy,
    mean_delta_nll,
    repair_jobs,
    repair_tables,
)
from experiments.study.experiment_errors import ExperimentError
from experiments.study.looks import look
from experiments.study.table_format import TIMES
from rap_env.errors import ArtifactError, CorpusError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.synthetic_records import (
    FIT_TEXTS,
    FITTED_RATIOS,
    OTHER_RATIOS,
    REPAIR_CELLS,
    REPAIR_TEXTS,
    make_repair_row,
    make_repair_rows,
)
from tests.experiments.tiny_study import tiny_study

CELLS = ["1x16@0.8", "2x32@0.7"]


def text(seed: int, windows: int = 8) -> TextConfig:
    return TextConfig(source="self", windows=windows, window_tokens=12, seed=seed)


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, stage="repair",
        calibration=text(9, 3),
        importance={"gsi_removals": 3},
        workload={"name": "grid", "batch_sizes": [1, 2], "seq_lens_tokens": [16],
                  "budget_fractions": [0.9, 0.7]},
        evaluate=EvaluateConfig(),
        stubs=StubsConfig(
            fit_texts={"first": text(1, 12), "second": text(2)},
            report_texts={"first": text(3), "third": text(4)},
            rank=2, cells=CELLS,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config) -> list[RepairRow]:
    return RepairRow.read(STUDY.run(config, config.stage_dir("repair")))


def test_there_is_a_row_for_each_repair_cell_and_text(rows):
    for name in ("none", "library"):
        assert {(row.cell, row.text) for row in rows if row.repair == name} == {
            (cell, text) for cell in ((1, 16, 0.8), (2, 32, 0.7)) for text in ("first", "third")
        }
    assert len(rows) == len(CELLS) * 2 * 2
    assert all(row.text not in row.fitted_on for row in rows if row.text == "third")


def test_every_mask_fits_its_budget_with_its_stubs(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    library = StubLibrary.load(config.stage_dir("repair") / "library.safetensors")
    for row in rows:
        assert row.peak_bytes <= row.budget_bytes
        request = Request(*row.cell[:2], row.budget_bytes)
        plain = MemoryModel(llm).peak_bytes(Plan.removing(*row.mask), request)
        if row.repair == "none":
            assert row.peak_bytes == plain
        else:
            stubs = sum(library.stubs[index].nbytes for index in Plan.removing(*row.mask).removed)
            assert row.peak_bytes == plain + stubs


def test_a_row_is_the_loss_of_the_repaired_mask_over_the_dense_model(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    study = RepairStudy(config, config.stage_dir("repair"))
    for row in rows:
        view = llm if row.repair == "none" else study.library.attach(llm)
        scorer = MaskScorer(view, study.report[row.text])
        loss = scorer.nll(Plan.removing(*row.mask)) - scorer.dense_nll
        assert row.delta_nll == pytest.approx(loss, abs=1e-6)
        assert row.delta_nll_ci_low <= row.delta_nll <= row.delta_nll_ci_high


def test_the_fitted_tokens_are_recorded(rows):
    assert {(row.repair, row.fit_tokens) for row in rows} == {("none", 0), ("library", 20 * 12)}


def test_other_settings_are_rejected_in_the_same_folder(config, rows):
    other = replace(config, stubs=replace(config.stubs, rank=3))
    with pytest.raises(ExperimentError, match=r"stubs\.rank: 2 -> 3"):
        STUDY.run(other, config.stage_dir("repair"))


def test_a_damaged_library_is_rejected(config, rows, tmp_path):
    folder = tmp_path / "repair"
    folder.mkdir()
    whole = (config.stage_dir("repair") / "library.safetensors").read_bytes()
    (folder / "library.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        list(repair_jobs(config, folder))


def test_text_that_is_fitted_on_is_not_reported_on(config, tmp_path):
    shared = tmp_path / "shared.txt"
    shared.write_text("the cat sat on the mat and looked at the dog. " * 200)
    source = TextConfig(source=str(shared), windows=4, window_tokens=36)
    stubs = replace(config.stubs, fit_texts={"a": source}, report_texts={"a": source})
    with pytest.raises(CorpusError, match="share"):
        list(repair_jobs(replace(config, stubs=stubs), tmp_path))


def test_invalid_settings_are_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match="need an entry each"):
        list(repair_jobs(replace(config, stubs=replace(config.stubs, report_texts={})), tmp_path))
    with pytest.raises(ExperimentError, match=r"leave repair\.name"):
        list(repair_jobs(replace(config, repair={"name": "library"}), tmp_path))
    table = replace(config.model, name="score_table:some/table.json")
    with pytest.raises(ExperimentError, match="needs a live model"):
        list(repair_jobs(replace(config, model=table), tmp_path))


CELL = (1, 128, 0.9)


def tables(data):
    """All tables by the first word of their titles."""
    return {part.title.partition(" ")[0]: part.table for part in repair_tables(data)}


@pytest.fixture(scope="module")
def data():
    return RepairComparison(make_repair_rows())


@pytest.mark.parametrize("repair", FITTED_RATIOS)
def test_ratios_are_of_means_over_the_grid(data, repair):
    cells = np.mean(list(REPAIR_CELLS.values()))
    plain = np.mean([REPAIR_TEXTS[text] for text in FIT_TEXTS]) * cells
    for other, ratios, mean in ((False, FITTED_RATIOS, plain), (True, OTHER_RATIOS, 1.4 * cells)):
        rows = data.on(repair, other=other)
        assert mean_delta_nll(rows).mean == pytest.approx(mean * ratios[repair])
        assert data.ratio(rows).mean == pytest.approx(ratios[repair])


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
    halved = [loss / 2 for loss in plain.window_delta_nll]
    stubs = make_repair_row("library", CELL, "wiki", window_delta_nll=halved)
    data = RepairComparison([plain, stubs])
    delta_nll, ratio = mean_delta_nll([stubs]), data.ratio(data.on("library", other=False))
    assert delta_nll.high - delta_nll.low > 0.1
    assert (ratio.low, ratio.high) == pytest.approx((0.5, 0.5))


def test_without_a_loss_to_divide_by_there_is_no_ratio():
    free = [0.01, -0.02, 0.005]  # a mask that costs nothing
    rows = [make_repair_row(r, CELL, "wiki", window_delta_nll=free) for r in ("none", "library")]
    data = RepairComparison(rows)
    assert data.ratio(data.on("library", other=False)) is None
    assert tables(data)[""][1][1][2] == "-"
    alone = RepairComparison([make_repair_row("library", CELL, "wiki")])
    assert alone.ratio(alone.rows) is None


def test_the_summary_table(data):
    header, rows = tables(data)[""]
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


def test_the_main_table_has_a_row_per_request_and_budget(data):
    header, rows = tables(data)["ΔNLL"]
    assert header == ["Request", "Budget", "self", "wiki", "code", "maths (not fitted on)",
                      "Blocks removed"]  # fmt: skip
    assert [row[:2] for row in rows] == [
        [f"1 {TIMES} 128", "90 % (235 MiB)"], [f"1 {TIMES} 128", "80 % (209 MiB)"],
        [f"8 {TIMES} 2,048", "90 % (573 MiB)"], [f"8 {TIMES} 2,048", "80 % (510 MiB)"],
    ]  # fmt: skip
    assert rows[0][3] == "1.60 → 0.88"
    assert rows[0][5] == "1.40 → 0.98"
    assert rows[0][6] == "3+4 → 4+4"
    assert "No stubs → Library" in repair_tables(data)[1].caption
