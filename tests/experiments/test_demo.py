"""The demo on a random model: its four stages, and that finished ones are not repeated."""

import re
from dataclasses import asdict, replace

import pytest

from experiments import live
from experiments.config.common import TextConfig
from experiments.config.program_settings import DemoConfig, EvaluateConfig, WarmStartConfig
from experiments.contexts import build_context, make_ladder_bytes
from experiments.demo import POLICY_FILE, RUN, demo
from rap_env.plan import Plan
from rap_env.policies.network_policy import PolicyFile
from rap_env.runtime.memory_monitor import TensorMeter
from tests.experiments.tiny_study import short_training, tiny_ladder_study
from tests.scoring.tiny_table import all_masks, fitted_again, table_of

METHODS = ["score_model", "frontier", "uniform", "knapsack", "one_shot"]


@pytest.fixture(scope="module")
def config(base):
    """Settings of the demo for a random model of three layers, with a score table of it."""
    config = tiny_ladder_study(
        base, stage="demo", name="demo",
        agent=replace(short_training(), label="rap"),
        warm_start=WarmStartConfig(teacher="score_model", requests=4, updates=20),
        evaluate=EvaluateConfig(
            requests=["4x64"], budgets=[0.9, 0.7], baselines=METHODS,
            text=TextConfig(source=str(base / "manual.txt"), windows=2, window_tokens=12),
        ),
        demo=DemoConfig(
            table=f"score_table:{base / 'table.json'}", live_s=2, chats=2, questions={"a?": "b"}
        ),
    )  # fmt: skip
    context = build_context(config)
    ladder = make_ladder_bytes(config, context).ladder
    costs = context.level_costs(ladder)
    plans = [Plan.uniform(3, caches=level, embeddings=embeddings)
             for level in ladder.cache_levels for embeddings in ("native", "int8")]  # fmt: skip
    masks = table_of(context, all_masks(6))
    scores = {plan: context.scorer.nll(plan) for plan in plans} | masks.scores
    table = fitted_again(replace(masks, levels=asdict(costs)), scores, lowered=costs.delta_nll)
    table.save(base / "table.json")
    return config


def test_four_stages_end_with_a_service_and_a_verdict(config, capsys, monkeypatch):
    monkeypatch.setattr("rap_env.runtime.controller.process_meter", TensorMeter)
    monkeypatch.setattr(live, "TEXT_CHARACTERS", 20)
    monkeypatch.setattr(live, "_FIRST_ANSWER", "b")
    monkeypatch.setattr(live, "CHAT_TOKENS", 8)
    monkeypatch.setattr(live, "ANSWER_TOKENS", 4)
    assert demo(config, config.root) == config.root
    out = capsys.readouterr().out
    stages = [line[:5] for line in out.splitlines() if line.startswith("[")]
    assert stages == [f"[{number}/4]" for number in range(1, 5)]
    for label in ("RAP policy", "Score model search", "Frontier", "Uniform", "Knapsack"):
        assert label in out
    assert "ΔNLL on held-out text" in out
    assert re.search(r"the policy loses (\d+ % (less|more) than|about as much as) \w", out)
    assert (config.stage_dir("live") / "live.png").read_bytes().startswith(b"\x89PNG")
    items = PolicyFile.load(config.stage_dir("train") / RUN / POLICY_FILE).items
    assert sum(name.endswith((".attn", ".ffn")) for name in items) == 6

    recording = live.recorded(config.stage_dir("live"))
    assert {answer.question for answer in recording.answers} == {*config.demo.questions}
    limits = [step.limit_bytes for step in recording.steps]
    assert min(limits) < 0.6 * max(limits)
    assert max(step.requests for step in recording.steps) > 1
    monkeypatch.setattr(live, "_FRAMES", 3)
    live.save_film(recording, config.root / "live.gif")
    assert (config.root / "live.gif").read_bytes().startswith(b"GIF8")

    def never(*_):
        raise AssertionError("a finished stage is repeated")

    monkeypatch.setattr(live, "LiveRun", never)
    results = config.stage_dir("evaluate") / "results.jsonl"
    before = results.read_bytes()
    demo(config, config.root)
    assert results.read_bytes() == before
