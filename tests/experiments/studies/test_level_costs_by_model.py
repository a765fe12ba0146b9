"""What each level costs a tiny real model, alone everywhere."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from experiments.config.program_settings import EvaluateConfig
from experiments.contexts import build_context, load_text
from experiments.studies.level_costs_by_model import STUDY, LevelCostRow, with_start
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.tiny_study import own_text, tiny_study


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=3, stage="level_costs_by_model", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
    )  # fmt: skip


def test_every_level_is_measured_everywhere(config):
    folder = config.stage_dir(config.stage)
    rows = LevelCostRow.read(STUDY.run(config, folder))
    by_name = {row.lowered: row for row in rows}
    assert list(by_name) == [
        ("weights", "int8"), ("weights", "int4"), ("embeddings", "int8"), ("embeddings", "int4"),
        ("caches", "int8"), ("caches", "int4"), ("caches", "int2"),
    ]  # fmt: skip
    assert {row.shipped_format for row in rows} == {"float32"}
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    scorer = PlanScorer(llm, load_text(config.evaluate.text, "report", llm, progress=False))
    plans = {
        ("weights", "int4"): Plan.uniform(3, weights="int4"),
        ("embeddings", "int8"): Plan(embeddings="int8"),
        ("caches", "int2"): Plan.uniform(3, caches="int2"),
    }
    for lowered, plan in plans.items():
        rise = scorer.window_nll(plan) - scorer.window_nll(Plan())
        row = by_name[lowered]
        assert row.window_delta_nll == pytest.approx(rise.tolist(), abs=1e-9)
        assert row.delta_nll != 0.0
    facts = llm.facts
    int4_bytes = sum(facts.weight_levels(block)["int4"] for block in range(facts.num_blocks))
    assert by_name["weights", "int4"].lowered_bytes == int4_bytes
    assert by_name["caches", "int2"].lowered_bytes == 0
    assert "| caches int2 | - |" in (folder / "tables.md").read_text()
    other = replace(config, model=replace(config.model, dtype="bfloat16"))
    both = LevelCostRow.read(STUDY.run(other, folder))
    assert len(both) == 2 * len(rows), "earlier rows stay"


def test_windows_begin_with_the_start_token_if_the_tokenizer_adds_one(config):
    llm, tokens = build_context(config).llm, torch.arange(12).view(2, 6)
    assert with_start(llm, tokens) is tokens
    fake = SimpleNamespace(tokenizer=Mock(return_value={"input_ids": [1, 7]}, bos_token_id=1))
    assert with_start(fake, tokens).tolist() == [[1, 0, 1, 2, 3, 4], [1, 6, 7, 8, 9, 10]]
