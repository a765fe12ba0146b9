"""Training on `RAPLadder-v0` by the program: warm start, resuming, and the exported policy."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.comparison.run_records import TABLE_FILE
from experiments.config.program_settings import (
    AgentConfig,
    EvaluateConfig,
    FrontierConfig,
    ScoreModelConfig,
    WarmStartConfig,
)
from experiments.contexts import build_context, frontier_artifact, make_ladder_bytes
from experiments.evaluate import decision_scores
from experiments.profile import profile
from experiments.score_model import (
    ROUNDS_FILE,
    demonstrations,
    draw_requests,
    make_envs,
    scored_masks,
)
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records
from experiments.study.run_folder import RunFolder
from experiments.train import train
from rap_env.envs.ladder import RAPLadderVectorEnv
from rap_env.errors import ArtifactError
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.scoring.score_table import ScoreTable
from tests.experiments.tiny_study import LEVELS, tiny_ladder_study


@pytest.fixture(scope="module")
def config(base):
    return tiny_ladder_study(
        base, stage="train",
        agent=AgentConfig(name="maskable_ppo", total_timesteps=64, n_envs=2,
                          hyperparameters={"n_steps": 16, "learning_rate": 1e-9}),
        warm_start=WarmStartConfig(teacher="one_shot", requests=12, updates=150),
        evaluate=EvaluateConfig(requests=["4x64"], budgets=[0.9, 0.7]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    return train(config, config.stage_dir("train") / "agent-s0")


def test_the_section_env_makes_the_environment_and_feasible_requests(config):
    context = build_context(config)
    envs = make_envs(config, context, 2)
    assert isinstance(envs, RAPLadderVectorEnv)
    assert envs.ladder.spec == {"levels": LEVELS, "together": ["int8"]}
    ladder_bytes = make_ladder_bytes(config, context)
    for request in draw_requests(config, context, 20, 5):
        costs = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        assert costs.least_peak_bytes <= request.budget_bytes < costs.native_peak_bytes


@pytest.mark.parametrize("teacher", ["one_shot", "knapsack", "greedy"])
def test_teachers_show_plans_that_fit(config, teacher):
    changed = replace(config, warm_start=replace(config.warm_start, teacher=teacher, requests=4))
    context = build_context(config)
    shown = demonstrations(changed, context)
    assert len(shown) == 4
    for each in shown:
        assert context.memory.peak_bytes(each.plan, each.request) <= each.request.budget_bytes
        assert each.plan


def test_the_run_records_its_choices_and_resumes(config, run):
    facts = RunFolder(run).read()
    assert facts["timesteps"] == 64
    assert np.isfinite(facts["objective"])
    longer = replace(config, agent=replace(config.agent, total_timesteps=96))
    assert train(longer, run) == run
    assert RunFolder(run).read()["timesteps"] == 96
    other = replace(config, env=replace(config.env, together=[]))
    with pytest.raises(ExperimentError, match="env.together"):
        train(other, run)


def test_rounds_on_predicted_plans_start_from_a_search_and_measure_what_the_policy_chooses(config):
    changed = replace(
        config,
        name="searched",
        frontier=FrontierConfig(evaluations=50, requests=16),
        warm_start=WarmStartConfig(teacher="score_model", requests=8, updates=50),
        score_model=ScoreModelConfig(rounds=2, verify_requests=6, members=2),
        reward={"name": "perplexity", "relative_to": "frontier"},
    )
    with pytest.raises(ArtifactError, match="There is no frontier artifact"):
        train(changed, changed.stage_dir("train") / "agent-s0")
    profile(changed, changed.stage_dir("profile"))
    context = build_context(changed)
    plan_table = PlanTable.load(frontier_artifact(changed), context.memory)
    assert any(not plan.is_mask for plan in plan_table.scores)
    folder = train(changed, changed.stage_dir("train") / "agent-s0")
    rounds = read_records(folder / ROUNDS_FILE)
    assert [record["round"] for record in rounds] == [0, 1]
    for record in rounds:
        scored = scored_masks(record)
        assert scored == {plan: context.scorer.nll(plan) for plan in scored}
    table = ScoreTable.load(folder / TABLE_FILE)
    assert set(plan_table.scores) <= set(table.scores)
    assert set(scored_masks(rounds[0])) <= set(table.scores), "learned from the first round"
    assert table.levels is not None
    scores = decision_scores(folder)
    unknown = [plan for plan in scored_masks(rounds[1]) if plan not in table.scores]
    unknown.append(Plan.uniform(table.facts.num_layers, caches="int4"))
    assert np.isfinite(scores(unknown)).all(), "it predicts plans that were not measured"
