"""Costs of levels of a tiny real model, one by one and by gradient."""

import pytest

from experiments.studies.level_scan import STUDY, LevelScanRow
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.tiny_study import own_text, tiny_study


def test_each_level_is_measured_alone_and_in_all_items(base):
    config = tiny_study(base, layers=2, stage="level_scan", calibration=own_text(2, 40))
    rows = LevelScanRow.read(STUDY.run(config, folder := config.stage_dir("level_scan")))
    by_name = {(row.item, row.level): row for row in rows}
    assert {row.item for row in rows} == {
        "layer00.attn", "layer00.ffn", "layer00.cache", "layer01.attn", "layer01.ffn",
        "layer01.cache", "blocks", "caches",
    }  # fmt: skip
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    text = load_corpus(CorpusConfig(windows=2, window_tokens=40), llm, progress=False)
    scorer = PlanScorer(llm, text)
    for item, plan in {
        "layer01.cache": Plan.of({"layer01.cache": "int2"}),
        "caches": Plan.uniform(2, caches="int2"),
    }.items():
        rise = scorer.nll(plan) - scorer.dense_nll
        assert by_name[item, "int2"].delta_nll == pytest.approx(rise, abs=1e-9)
    alone = [by_name[f"layer0{n}.cache", "int2"].by_gradient for n in (0, 1)]
    assert by_name["caches", "int2"].by_gradient == pytest.approx(sum(alone))
    assert min(alone) > 0
    assert ("blocks", "removed") not in by_name
    assert "| caches int2 | " in (folder / "tables.md").read_text()
