"""The program that measures levels: its artifacts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.program_settings import LevelsConfig
from experiments.contexts import build_context
from experiments.levels import COSTS_FILE, levels
from experiments.study.console import ExperimentError
from rap_env.importance.level_costs import LevelCosts
from rap_env.plan import Plan
from tests.experiments.tiny_study import own_text, tiny_study


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model of two layers in a separate folder."""
    return tiny_study(
        base, layers=2, stage="levels", calibration=own_text(2, 48),
        levels=LevelsConfig(
            caches=["int8", "int2", "int2-window512"], requests=["1x16", "2x60"],
            joint_budgets=[0.8], out=str(base / "saved" / "tiny.levels.json"),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(config):
    levels(config, config.stage_dir("levels"))
    return config


def test_costs_are_measured_on_the_model(measured):
    context = build_context(measured, profiled=False)
    costs = LevelCosts.load(measured.stage_dir("levels") / COSTS_FILE, context.memory)
    assert costs.window_tokens == 48
    assert set(costs.costs["layer01.cache"]) == {"int8", "int2"}, "the window holds the text"
    both = Plan.uniform(2, caches="int2")
    rise = context.scorer.nll(both) - context.scorer.dense_nll
    assert costs.joint[both.to_json()] == pytest.approx(rise, abs=1e-12)
    assert rise != 0
    assert costs.provenance["text"]["role"] == "calibration"


def test_facts_are_written_beside_the_costs(measured):
    path = Path(measured.levels.out).with_name("tiny.facts.json")
    body = json.loads(path.read_text())["body"]
    assert set(body) == {"native", "bf16"}
    facts = build_context(measured, profiled=False).memory.facts
    assert body["native"]["fingerprint"] == facts.fingerprint


def test_a_second_run_measures_nothing_and_other_levels_are_rejected(measured):
    folder = measured.stage_dir("levels")
    before = {path.name: path.read_bytes() for path in folder.glob("[!r]*.*") if path.is_file()}
    assert COSTS_FILE in before
    levels(measured, folder)
    assert before == {name: (folder / name).read_bytes() for name in before}
    other = replace(measured, levels=replace(measured.levels, caches=["int4"]))
    with pytest.raises(ExperimentError, match=r"levels\.caches"):
        levels(other, folder)


def test_wrong_settings_are_rejected(config):
    with pytest.raises(ExperimentError, match=r"must end in \.levels\.json, not 'costs\.json'"):
        replace(config, levels=LevelsConfig(out="costs.json"))
    with pytest.raises(Exception, match="Unknown level of a cache 'int3'"):
        replace(config, levels=LevelsConfig(caches=["int3"]))
