"""Live contexts: shared in a process, stored between runs, separate for each configuration."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rap_env.artifacts import load_artifact
from rap_env.context import live as live_module
from rap_env.context.base import ContextConfig
from rap_env.context.opening import open_context
from rap_env.errors import ArtifactError
from rap_env.importance.gsi_search import gsi
from rap_env.importance.profiles import GSIProfile
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.packaged_files import default_facts
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import TEXTS
from rap_env.scoring.store import ScoreStore
from tests.envs.tiny_contexts import live_context
from tests.models.states import saved
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_llm


def make_live(tmp_path, **settings):
    return live_context(tiny_llm(layers=3), Corpus.of_tokens(tokens()), folder=tmp_path, **settings)


def test_importance_is_measured_once_and_kept(tmp_path):
    first = make_live(tmp_path, gsi_removals=2)
    assert len(first.gsi.order) == 2
    without = first.one_shot.nll_without
    assert first.scorer.evaluations == 6 + 5 + 1
    again = make_live(tmp_path, gsi_removals=2)
    assert again.gsi == first.gsi
    assert again.one_shot.nll_without == without
    assert again.features.gsi_rank.tolist() == first.gsi.rank.tolist()
    assert again.scorer.evaluations == 0


def test_observations_do_not_depend_on_earlier_measurements(tmp_path):
    fresh = make_live(tmp_path / "a", gsi_removals=1).features
    longer = make_live(tmp_path / "b", gsi_removals=4)
    assert len(longer.gsi.order) == 4
    after = make_live(tmp_path / "b", gsi_removals=1).features
    assert np.array_equal(fresh.gsi_marginal_loss, after.gsi_marginal_loss)
    assert np.array_equal(fresh.gsi_rank, after.gsi_rank)


def test_an_artifact_by_path(tmp_path):
    path = tmp_path / "mine.json"
    profile = gsi(make_live(tmp_path).scorer, stop=3, path=path, progress=False)
    assert make_live(tmp_path, importance=str(path)).gsi == profile
    other = live_context(
        tiny_llm(layers=3, seed=9), Corpus.of_tokens(tokens()), importance=str(path)
    )
    with pytest.raises(ArtifactError, match="other weights"):
        _ = other.gsi


def test_a_packaged_order_is_used_where_it_fits(tmp_path, monkeypatch):
    path = tmp_path / "packaged.json"
    profile = gsi(make_live(tmp_path).scorer, stop=3, path=path, progress=False)
    monkeypatch.setattr(live_module, "PACKAGED_ORDERS", (path,))
    fitting = make_live(tmp_path / "folder", gsi_removals=3)
    assert fitting.gsi == profile
    assert fitting.scorer.evaluations == 0
    for settings in ({"gsi_removals": 2}, {"gsi_removals": 3, "gsi_method": "lazy"}):
        other = make_live(tmp_path / "folder", **settings)
        assert len(other.gsi.order) == settings["gsi_removals"]
        assert other.scorer.evaluations > 0
    text = live_context(tiny_llm(layers=3), Corpus.of_tokens(tokens(seed=1)), gsi_removals=3)
    assert text.gsi.dense_nll != profile.dense_nll


def test_the_package_has_the_order_of_the_default_settings():
    (path,) = (p for p in live_module.PACKAGED_ORDERS if p.name == "smollm2-135m.gsi.json")
    profile = GSIProfile.load(path, MemoryModel(default_facts("bf16")))
    settings = ContextConfig()
    assert (profile.method, len(profile.order)) == (settings.gsi_method, settings.gsi_removals)
    (written,) = TEXTS.glob("987854d9*.json")
    text = Corpus.of_tokens(torch.tensor(load_artifact(written, "corpus", 1)["tokens"]))
    assert profile.provenance["text"]["sha256"] == text.sha256


def test_one_context_for_each_config(tmp_path):
    folder = saved(tmp_path / "model", dtype=torch.float32)
    text = CorpusConfig(windows=2, window_tokens=8)
    config = ContextConfig(
        model=str(folder), dtype="float32", calibration=text, store=str(tmp_path / "s.sqlite")
    )
    first = open_context(config)
    assert open_context(config) is first
    first.scorer.nll_many([Plan.removing(block) for block in range(4)])
    assert len(ScoreStore(tmp_path / "s.sqlite")) == 4
    other = open_context(replace(config, store=None))
    assert other is not first
    assert other.llm is first.llm  # one model in memory
