"""Export of a run's policy: the same masks as the run, also if its folder was moved."""

import shutil

import pytest
import yaml

from agents.trained_policy import TrainedPolicy
from experiments.config.common import ImportanceConfig
from experiments.config.program_settings import EvaluateConfig, FrontierConfig
from experiments.contexts import build_context
from experiments.export_policy import ExportPolicyConfig, export, settings_of
from experiments.profile import profile
from experiments.study.console import ExperimentError
from experiments.train import train
from rap_env.errors import ArtifactError
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.request import Request
from tests.experiments.tiny_study import own_text, short_training, tiny_study

STORED = Plan.removing(0, 1, 2, 3, 4, 5, 7)
"""A mask that is in the store before the frontier is built."""


@pytest.fixture(scope="module")
def config(base):
    """Settings of a run on a random model of four layers, with a profile and a frontier."""
    return tiny_study(
        base, stage="train", threads=1,
        importance=ImportanceConfig(gsi_removals=3),
        frontier=FrontierConfig(evaluations=40, requests=8),
        agent=short_training(),
        evaluate=EvaluateConfig(requests=["1x16"], budgets=[0.9], text=own_text()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    build_context(config).scorer.nll(STORED)
    profile(config, config.stage_dir("profile"))
    return train(config, config.stage_dir("train") / "maskable_ppo-s0")


def asked(memory):
    return [Request.at_fraction(memory, 2, 16, fraction) for fraction in (0.9, 0.8, 0.7)]


def test_the_exported_file_chooses_like_the_run(config, run, tmp_path):
    path = export(ExportPolicyConfig(str(run), str(tmp_path / "rap.safetensors")))
    context = build_context(config)
    exported = load_policy(path, context.memory)
    assert isinstance(exported, NetworkPolicy)
    trained = TrainedPolicy.load(run, context)
    for request in asked(context.memory):
        assert exported.choose(request) == trained.choose(request)
    assert exported.order == context.gsi.full_order
    assert exported.file.model["fingerprint"] == context.memory.facts.fingerprint


def test_a_comparison_that_was_moved_is_found_with_its_profile(config, run, tmp_path):
    moved = shutil.copytree(config.root, tmp_path / "elsewhere" / "other")
    settings = settings_of(moved / "train" / run.name)
    assert (settings.root, settings.model) == (
        (tmp_path / "elsewhere" / "other").resolve(),
        config.model,
    )


def test_a_folder_without_a_run_is_rejected(config, run, tmp_path):
    with pytest.raises(ExperimentError, match="is not a run folder: it has no config.yaml"):
        export(ExportPolicyConfig(str(tmp_path), "rap.safetensors"))
    untrained = tmp_path / "train" / "x-s0"
    untrained.mkdir(parents=True)
    text = (run / "config.yaml").read_text()
    (untrained / "config.yaml").write_text(text)
    with pytest.raises(ArtifactError, match="holds no checkpoint"):
        export(ExportPolicyConfig(str(untrained), "rap.safetensors"))
    settings = yaml.safe_load(text)
    settings["agent"]["nmae"] = 1
    (untrained / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ExperimentError, match="does not support: .*nmae"):
        export(ExportPolicyConfig(str(untrained), "rap.safetensors"))


def test_the_output_file_needs_a_loadable_suffix():
    with pytest.raises(ExperimentError, match=r"out must end in \.safetensors"):
        ExportPolicyConfig("run", "policy.bin")
