"""A training on a packaged score table ends with its result."""

import re

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import as_config
from experiments.contexts import build_context
from experiments.launch import CONF_DIR
from experiments.train import task_of, train, verdict
from rap_env.errors import ArtifactError
from rap_env.leaderboard.tasks import pinned_task

SHORT = ["agent.total_timesteps=64", "agent.n_envs=2", "agent.hyperparameters.n_steps=32",
         "agent.hyperparameters.batch_size=32", "warm_start.updates=2", "warm_start.requests=4",
         "progress=false"]  # fmt: skip


def composed(*overrides):
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        return as_config(compose("train", overrides=list(overrides)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings, the run and the context of a short training by the README's command."""
    runs = tmp_path_factory.mktemp("runs")
    config = composed("experiment=table", "name=mine", f"runs_dir={runs}", *SHORT)
    folder = train(config, config.stage_dir("train") / "maskable_ppo-s0")
    return config, folder, build_context(config)


def test_the_result_stands_beside_the_published_methods(trained):
    config, folder, context = trained
    task = pinned_task(task_of(config))
    assert task.environment == "RAPLadder-v0"
    assert not task.live
    text = verdict(config, folder, context)
    assert "Knapsack" in text
    mean = float(re.search(r"(?m)^maskable_ppo-s0 \(this\) +- +(\S+)$", text)[1])
    assert mean > 0, "predicted, and so without a rank"
    assert re.search(r"\d+ of 30 values of .* are predicted", text)
    assert "published methods were measured" in text


def test_a_training_without_a_pinned_task_has_no_verdict(trained):
    _, folder, context = trained
    assert verdict(composed(), folder, context) == ""


@pytest.mark.parametrize(
    ("settings", "weights"),
    [([], "bf16"), (["importance=one_shot"], "bf16"),
     (["env=ladder", "importance=one_shot"], "native")],
)  # fmt: skip
def test_settings_that_a_table_fixes_are_taken_from_it(settings, weights):
    config = composed("model.name=score_table:smollm2-135m", *settings)
    packed = build_context(config).table.facts.packed
    assert packed == (weights == "native")


def test_a_setting_that_differs_from_the_tables_is_named_with_both_values():
    config = composed("experiment=table", "importance.gsi_removals=20")
    with pytest.raises(ArtifactError, match=r"gsi_removals=34.*gsi_removals=20"):
        build_context(config)
