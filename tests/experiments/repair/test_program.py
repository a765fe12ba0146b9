"""The repair program on a tiny real model: libraries, rows, resuming, rejected settings."""

from dataclasses import replace

import pytest

from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.model import StubsConfig
from experiments.repair.rows import RepairRow
from experiments.repair.study import STUDY, RepairStudy, repair_jobs
from experiments.study.errors import ExperimentError
from rap_env.errors import ArtifactError, CorpusError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
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
        assert row.loss == pytest.approx(loss, abs=1e-6)
        assert row.loss_ci_low <= row.loss <= row.loss_ci_high


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
