"""Warm start and training on predicted scores: real scores correct it, and it resumes."""

from dataclasses import replace

import numpy as np
import pytest

from agents.trained_policy import TrainedPolicy
from experiments.config.common import ImportanceConfig
from experiments.config.program_settings import (
    AgentConfig,
    EvaluateConfig,
    FrontierConfig,
    ScoreModelConfig,
    WarmStartConfig,
)
from experiments.contexts import build_context, make_ladder_bytes
from experiments.profile import profile
from experiments.score_model import ROUNDS_FILE, demonstrations, scored_masks
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records
from experiments.study.run_folder import RunFolder
from experiments.train import train
from rap_env.scoring.score_table import ScoreTable
from tests.experiments.tiny_study import tiny_study

WORKLOAD = {
    "name": "grid", "batch_sizes": [1, 4], "seq_lens_tokens": [8, 16],
    "budget_fractions": [0.8, 0.9],
}  # fmt: skip


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of five layers, profiled with a frontier."""
    made = tiny_study(
        base, layers=5, stage="train", threads=1, workload=WORKLOAD,
        reward={"name": "perplexity", "relative_to": "frontier"},
        importance=ImportanceConfig(gsi_removals=3),
        frontier=FrontierConfig(evaluations=120, requests=16),
        warm_start=WarmStartConfig(teacher="frontier", requests=16, updates=150),
        score_model=ScoreModelConfig(rounds=2, verify_requests=6, members=2),
        agent=AgentConfig(
            name="maskable_ppo", total_timesteps=256, n_envs=4,
            hyperparameters={"n_steps": 16, "learning_rate": 1e-4},
            policy_settings={"block_vectors": 4},
        ),
        evaluate=EvaluateConfig(requests=["1x16"], budgets=[0.9]),
    )  # fmt: skip
    profile(replace(made, stage="profile"), made.stage_dir("profile"))
    return made


def folder_of(config, label="agent-s0"):
    return config.stage_dir("train") / label


def test_the_policy_starts_at_its_teacher(config):
    context = build_context(config)
    started = replace(
        config,
        score_model=ScoreModelConfig(),
        agent=replace(config.agent, total_timesteps=64, hyperparameters={"learning_rate": 1e-9}),
    )
    policy = TrainedPolicy.load(train(started, folder_of(config, "warm-s0")), context)
    shown = demonstrations(config, context)
    # This random model's best masks remove more than they must; an episode ends when it fits.
    within = [policy.choose(one.request).removed <= one.plan.removed for one in shown]
    assert np.mean(within) > 0.9


def test_demonstrations_fit_and_come_from_the_frontier(config):
    context = build_context(config)
    ladder_bytes = make_ladder_bytes(config, context)
    known = context.frontier.on(ladder_bytes.ladder)
    for shown in demonstrations(config, context):
        costs = ladder_bytes.costs(shown.request.batch_size, shown.request.seq_len_tokens)
        assert shown.plan == known.best(costs, shown.request.budget_bytes)
        peak = context.memory.peak_bytes(shown.plan, shown.request)
        assert peak <= shown.request.budget_bytes


@pytest.mark.slow
def test_rounds_verify_with_real_scores_and_learn_from_them(config):
    folder = train(config, folder_of(config))
    context, rounds = build_context(config), read_records(folder / ROUNDS_FILE)
    assert [record["round"] for record in rounds] == [0, 1]
    scored = [scored_masks(record) for record in rounds]
    for scores in scored:
        assert list(scores.values()) == context.scorer.nll_many(list(scores))
    table = ScoreTable.load(folder / "score_table.json")
    assert scored[0].keys() <= table.scores.keys()  # the next round knows them
    known = context.frontier.scores.keys() | scored[0].keys() | scored[1].keys()
    assert RunFolder(folder).read()["evaluations"] == len(known)


def test_rounds_refuse_a_frontier_that_was_measured_on_other_text(config):
    other = replace(config, calibration=replace(config.calibration, seed=1))
    with pytest.raises(ExperimentError, match=r"frontier\.json was measured on other text"):
        train(other, folder_of(config, "other-s0"))
