"""Learning curves: a trainer is evaluated as it goes on, recorded, and drawn."""

import json

import click
import pytest

import experiments.learning_curves as program
from experiments.learning_curves import BASELINES, learning_curves, read_curves
from rap_env.leaderboard.entries import published_entries

TRAINER = """
import numpy as np
TASK = "RAPLadder/SmolLM2-Table-v1"
class Agent:
    def __init__(self, seed): self.rng, self.greedy = np.random.default_rng(seed), False
    def predict(self, observation, deterministic=True):
        rows = observation["ladder"]
        place = rows[:, 8] if self.greedy else self.rng.random(len(rows))
        return int(np.argmin(np.where(observation["action_mask"], place, np.inf))), None
def train(seed, watch):
    agent = Agent(seed)
    for steps in (256, 600, 700, 900):
        agent.greedy = steps > 700
        watch(steps, agent)
    return agent
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "EXAMPLES", tmp_path)
    (tmp_path / "ppo_single_file.py").write_text(TRAINER)
    return program.record("ppo_single_file", 2, tmp_path)


def test_agents_are_evaluated_at_growing_steps_and_at_the_end(recorded):
    curves = read_curves(recorded.parent)["ppo_single_file"]
    assert list(curves) == [0, 1]
    for points in curves.values():
        assert [point.steps for point in points] == [600, 900]
        first, last = points
        assert last.delta_nll < 0.5 * first.delta_nll, "the greedy order beats random actions"
        assert 0 <= first.process_s <= last.process_s
    assert curves[0][0].delta_nll != curves[1][0].delta_nll, "seeds differ"
    assert curves[0][1].delta_nll == curves[1][1].delta_nll
    head = json.loads(recorded.read_text().splitlines()[0])["provenance"]
    assert head["task"] == "RAPLadder/SmolLM2-Table-v1"
    assert {"torch", "gymnasium", "rap-env", "python"} <= set(head)


def test_the_figure_has_the_mean_and_the_range_of_the_seeds(recorded):
    found = read_curves(recorded.parent)
    assert list(found) == ["ppo_single_file"]
    online, offline = learning_curves(found).axes
    line, *published = online.lines
    both = [[point.delta_nll for point in points] for points in found["ppo_single_file"].values()]
    assert list(line.get_ydata()) == [sum(pair) / 2 for pair in zip(*both, strict=True)]
    assert len(online.collections) == 1
    knapsack = next(e for e in published_entries("SmolLM2-v1") if e.name == "Knapsack")
    heights = [each.get_ydata()[0] for each in published]
    assert float(knapsack.scores("calibration").mean()) in heights
    assert heights == [each.get_ydata()[0] for each in offline.lines]
    assert {text.get_text() for text in online.texts} == set(BASELINES)


def test_an_unknown_example_is_named(tmp_path):
    with pytest.raises(click.BadParameter, match="has no absent.py"):
        program.record("absent", 1, tmp_path)
