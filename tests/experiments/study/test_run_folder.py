"""Run folders record their settings, versions and starts."""

import time
from dataclasses import replace

import pytest

from experiments.config import Config
from experiments.config.program_settings import AgentConfig
from experiments.study.console import ExperimentError
from experiments.study.run_folder import RunFolder
from rap_env.errors import ArtifactError


@pytest.fixture
def config():
    return Config(stage="train", name="x", agent=AgentConfig(name="ppo"), seed=3)


def test_a_folder_holds_config_versions_machine_and_seeds(tmp_path, config):
    run = RunFolder(tmp_path / "ppo-s3")
    run.start(config, method="ppo", seed=3)
    facts, settings = run.read(), run.settings()
    assert settings["agent"]["name"] == "ppo"
    assert facts["method"] == "ppo"
    assert facts["provenance"]["packages"]["torch"]
    assert facts["provenance"]["seeds"]["run"] == 3
    assert facts["provenance"]["machine"]["cpu"]
    assert "finished" not in facts


def test_resuming_adds_a_start_and_the_time(tmp_path, config):
    run = RunFolder(tmp_path)
    for _ in range(2):
        run.start(config)
        run.finish(time.monotonic() - 1, timesteps=7)
    assert len(run.read()["starts"]) == 2
    assert run.read()["seconds"] >= 2
    assert run.read()["timesteps"] == 7


def test_other_settings_are_rejected_by_name(tmp_path, config):
    run = RunFolder(tmp_path)
    run.start(config, frozen=("agent", "seed"))
    changed = replace(config, agent=replace(config.agent, n_envs=2))
    with pytest.raises(ExperimentError, match=r"agent\.n_envs: 8 -> 2.*another name"):
        run.start(changed, frozen=("agent", "seed"))
    longer = replace(config, agent=replace(config.agent, total_timesteps=99), progress=False)
    run.start(longer, frozen=("agent", "seed"))
    assert run.settings()["agent"]["total_timesteps"] == 99


def test_a_damaged_run_json_raises_an_error_with_a_remedy(tmp_path, config):
    run = RunFolder(tmp_path)
    run.start(config)
    (tmp_path / "run.json").write_text('{"stage": ')
    with pytest.raises(ArtifactError, match="is damaged; delete the file"):
        run.read()
