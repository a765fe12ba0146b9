"""The objective that a sweep minimises."""

from dataclasses import replace

import pytest

from agents.trained_policy import TrainedPolicy
from experiments.config.common import TextConfig
from experiments.config.program_settings import EvaluateConfig
from experiments.contexts import build_context, evaluation_cells, make_ladder_bytes
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records
from experiments.study.run_folder import RunFolder
from experiments.train import run_trial
from rap_env.errors import CorpusError
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.tiny_study import own_text, short_training, tiny_study


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of four layers."""
    return tiny_study(
        base, stage="train", threads=1,
        agent=short_training(32),
        evaluate=EvaluateConfig(requests=["1x16", "2x32"], budgets=[0.9, 0.8]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config):
    folder = config.stage_dir("train") / "maskable_ppo-s0"
    run_trial(config, folder)
    return folder


def expected(config, folder, scorer):
    """The mean loss, from parts of the library alone."""
    context = build_context(config)
    policy = TrainedPolicy.load(folder, context)
    cells = evaluation_cells(config.evaluate, make_ladder_bytes(config, context))
    plans = [policy.choose(cell.request) for cell in cells]
    return sum(scorer.nll(plan) - scorer.native_nll for plan in plans) / len(plans)


def test_the_objective_is_the_mean_loss_on_the_grid(config, trained):
    facts = RunFolder(trained).read()
    assert facts["objective"] == pytest.approx(
        expected(config, trained, build_context(config).scorer)
    )
    last = read_records(trained / "metrics.jsonl")[-1]
    assert (last["objective"], last["step"]) == (facts["objective"], facts["timesteps"])


def test_a_finished_run_returns_its_objective_without_training(config, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    assert run_trial(config, trained) == RunFolder(trained).read()["objective"]
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_the_objective_may_be_on_another_text(config):
    other = replace(
        config, name="other", evaluate=replace(config.evaluate, selection=own_text(2, 12, 7))
    )
    folder = other.stage_dir("train") / "maskable_ppo-s0"
    context = build_context(config)
    corpus = load_corpus(
        CorpusConfig(source="self", windows=2, window_tokens=12, seed=7, role="selection"),
        context.llm,
    )
    assert corpus.sha256 != context.scorer.corpus.sha256
    measured = run_trial(other, folder)
    assert measured == pytest.approx(expected(config, folder, PlanScorer(context.llm, corpus)))


def test_a_run_keeps_the_text_of_its_objective(config, trained):
    other = replace(config, evaluate=replace(config.evaluate, selection=own_text(2, 12, 7)))
    with pytest.raises(ExperimentError, match="evaluate.selection"):
        run_trial(other, trained)


def test_the_calibration_text_is_rejected_as_selection_text(config, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh. " * 60)
    text = TextConfig(source=str(path), windows=2, window_tokens=12)
    same = replace(
        config, name="same", calibration=text, evaluate=replace(config.evaluate, selection=text)
    )
    folder = same.stage_dir("train") / "maskable_ppo-s0"
    with pytest.raises(CorpusError, match="calibration and the selection text share"):
        run_trial(same, folder)
    assert not (folder / "checkpoints").exists(), "refused before it trains"
