"""One workbench for all that measure: shared, kept between runs, never mixed up."""

from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import ArtifactError
from rap_env.importance import gsi
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.store import ScoreStore
from rap_env.workbench import Workbench, WorkbenchConfig, open_workbench
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer


def bench(tmp_path, **settings):
    settings = {"folder": tmp_path, "progress": False, **settings}
    return Workbench(tiny_llm(layers=3), Corpus.of_tokens(tokens()), **settings)


def test_importance_is_measured_once_and_kept(tmp_path):
    first = bench(tmp_path, gsi_removals=2)
    assert len(first.gsi.order) == 2
    without = first.one_shot.nll_without
    assert first.scorer.evaluations == 6 + 5 + 1
    again = bench(tmp_path, gsi_removals=2)
    assert again.gsi == first.gsi
    assert again.one_shot.nll_without == without
    assert again.features.gsi_rank.tolist() == first.gsi.rank.tolist()
    assert again.scorer.evaluations == 0


def test_what_an_agent_sees_does_not_depend_on_what_was_measured_before(tmp_path):
    fresh = bench(tmp_path / "a", gsi_removals=1).features
    longer = bench(tmp_path / "b", gsi_removals=4)
    assert len(longer.gsi.order) == 4
    after = bench(tmp_path / "b", gsi_removals=1).features
    assert np.array_equal(fresh.gsi_marginal_loss, after.gsi_marginal_loss)
    assert np.array_equal(fresh.gsi_rank, after.gsi_rank)


def test_kinds_of_importance(tmp_path):
    none = bench(tmp_path, importance="none")
    assert not none.features.one_shot.any()
    assert none.scorer.evaluations == 0
    single = bench(tmp_path, importance="one_shot")
    assert np.array_equal(single.features.one_shot, single.one_shot.loss_rise)


def test_an_artifact_by_path(tmp_path):
    path = tmp_path / "mine.json"
    profile = gsi(bench(tmp_path).scorer, stop=3, path=path, progress=False)
    assert bench(tmp_path, importance=str(path)).gsi == profile
    other = Workbench(tiny_llm(layers=3, seed=9), Corpus.of_tokens(tokens()), importance=str(path))
    with pytest.raises(ArtifactError, match="other weights"):
        _ = other.gsi


def test_one_workbench_for_each_config(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = CorpusConfig(windows=2, window_tokens=8)
    config = WorkbenchConfig(
        model=str(folder), dtype="float32", calibration=text, store=str(tmp_path / "s.sqlite")
    )
    first = open_workbench(config)
    assert open_workbench(config) is first
    first.scorer.scan(first.llm.mask)
    assert len(ScoreStore(tmp_path / "s.sqlite")) == 4
    other = open_workbench(replace(config, store=None))
    assert other is not first
    assert other.llm is first.llm  # one model in memory
