"""The repair program on a tiny real model: libraries, rows, resuming, rejected settings."""

from dataclasses import replace

import pytest

from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.model import StubsConfig
from experiments.repair.libraries import StubLibraries
from experiments.repair.rows import RepairRow
from experiments.repair.study import STUDY, repair_jobs
from experiments.study.errors import ExperimentError
from rap_env.errors import ArtifactError, CorpusError, UnknownNameError
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
            rank=2, distill_steps=4, distill_windows=3, cells=CELLS,
            study_cells=CELLS[1:], domain_study=["second"],
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config) -> list[RepairRow]:
    return RepairRow.read(STUDY.run(config, config.stage_dir("repair")))


def _grid(rows: list[RepairRow], name: str) -> list[RepairRow]:
    return [row for row in rows if (row.study, row.repair) == ("grid", name)]


def test_there_is_a_row_for_each_repair_cell_and_text(rows):
    for name in ("none", "library", "distilled"):
        assert {(row.cell, row.text) for row in _grid(rows, name)} == {
            (cell, text) for cell in ((1, 16, 0.8), (2, 32, 0.7)) for text in ("first", "third")
        }
    assert len(rows) == len(CELLS) * 2 * 3 + 2
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
        elif row.study == "grid" and row.repair == "library":
            stubs = sum(library.stubs[index].nbytes for index in Plan.removing(*row.mask).removed)
            assert row.peak_bytes == plain + stubs


def test_a_row_is_the_loss_of_the_repaired_mask_over_the_dense_model(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    libraries = StubLibraries(config, config.stage_dir("repair"))
    for row in (*_grid(rows, "library"), *_grid(rows, "distilled"), *_grid(rows, "none")):
        library = {"none": None, "library": libraries.library, "distilled": libraries.distilled}[
            row.repair
        ]
        view = llm if library is None else library.attach(llm)
        scorer = MaskScorer(view, libraries.texts.report[row.text])
        loss = scorer.nll(Plan.removing(*row.mask)) - scorer.dense_nll
        assert row.loss == pytest.approx(loss, abs=1e-6)
        assert row.loss_ci_low <= row.loss <= row.loss_ci_high


def test_the_fitted_tokens_are_recorded(rows):
    tokens = {(row.study, row.repair): row.fit_tokens for row in rows}
    assert tokens == {
        ("grid", "none"): 0, ("grid", "library"): 20 * 12, ("grid", "distilled"): 20 * 12,
        ("domain", "library"): 8 * 12,
    }  # fmt: skip
    (domain,) = {tuple(row.fitted_on) for row in rows if row.study == "domain"}
    assert domain == ("second",)
    masks = {(row.study, row.cell): row.mask for row in rows if row.repair == "library"}
    cell = (2, 32, 0.7)
    assert {row.cell for row in rows if row.study != "grid"} == {cell}
    assert masks["domain", cell] == masks["grid", cell]


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
    stubs = replace(
        config.stubs, fit_texts={"a": source}, report_texts={"a": source}, domain_study=[]
    )
    with pytest.raises(CorpusError, match="share"):
        list(repair_jobs(replace(config, stubs=stubs), tmp_path))


def test_invalid_settings_are_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match="need an entry each"):
        list(repair_jobs(replace(config, stubs=replace(config.stubs, report_texts={})), tmp_path))
    with pytest.raises(ExperimentError, match=r"leave repair\.name"):
        list(repair_jobs(replace(config, repair={"name": "library"}), tmp_path))
    capped = replace(config.model, max_memory_bytes=10**9)
    with pytest.raises(ExperimentError, match=r"set stubs\.distill_steps=0"):
        list(repair_jobs(replace(config, model=capped), tmp_path))
    table = replace(config.model, name="score_table:some/table.json")
    with pytest.raises(ExperimentError, match="needs a live model"):
        list(repair_jobs(replace(config, model=table), tmp_path))
    with pytest.raises(UnknownNameError, match=r"domain_study.*'b'"):
        StubsConfig(fit_texts={"a": text(0)}, domain_study=["b"])
    with pytest.raises(UnknownNameError, match=r"study_cells.*'1x16@0\.5'"):
        StubsConfig(cells=CELLS, study_cells=["1x16@0.5"])
