"""What each level costs a tiny real model, with weights rounded in several ways."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from experiments.config.evaluation_settings import EvaluateConfig
from experiments.contexts import build_context, load_text
from experiments.studies.level_costs_by_model import STUDY, LevelCostRow, with_start
from rap_env.models.files.loading import load_llm
from rap_env.models.weights.quantisers import round_to_nearest
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.tiny_study import own_text, tiny_study


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=3, stage="level_costs_by_model", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
    )  # fmt: skip


def test_what_levels_cost_depends_on_how_weights_were_rounded(config):
    folder = config.stage_dir(config.stage)
    rows = LevelCostRow.read(STUDY.run(config, folder))
    by_name = {row.lowered: row for row in rows}
    assert set(by_name) == {
        ("weights", "int8", "fitted"), ("weights", "int4", "fitted"),
        ("weights", "int4", "nearest"), ("weights", "int4", "calibrated"),
        ("embeddings", "int8", "fitted"), ("embeddings", "int4", "fitted"),
        ("caches", "int8", ""), ("caches", "int4", ""), ("caches", "int2", ""),
    }  # fmt: skip
    assert {row.shipped_format for row in rows} == {"float32"}
    sizes = [by_name["weights", level, "fitted"].lowered_bytes for level in ("int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert by_name["caches", "int2", ""].lowered_bytes == 0
    losses = {row.delta_nll for row in rows if (row.what, row.level) == ("weights", "int4")}
    assert len(losses) == 3, "each rounding gives other weights"

    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    scorer = MaskScorer(llm, load_text(config.evaluate.text, "report", llm, progress=False))
    native, caches = (scorer.window_nll(plan) for plan in (Plan(), Plan.uniform(3, caches="int2")))
    row = by_name["caches", "int2", ""]
    assert row.window_delta_nll == pytest.approx((caches - native).tolist(), abs=1e-9)
    with torch.no_grad():
        for layer in llm.model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(round_to_nearest(layer.weight).widened(torch.float32))
    nearest = MaskScorer(llm, scorer.corpus).window_nll(Plan()) - native
    row = by_name["weights", "int4", "nearest"]
    assert row.window_delta_nll == pytest.approx(nearest.tolist(), abs=1e-5)

    other = replace(config, model=replace(config.model, dtype="bfloat16"))
    both = LevelCostRow.read(STUDY.run(other, folder))
    assert len(both) == 2 * len(rows), "earlier rows stay"


def test_windows_begin_with_the_start_token_if_the_tokenizer_adds_one(config):
    llm, tokens = build_context(config).llm, torch.arange(12).view(2, 6)
    assert with_start(llm, tokens) is tokens
    fake = SimpleNamespace(tokenizer=Mock(return_value={"input_ids": [1, 7]}, bos_token_id=1))
    assert with_start(fake, tokens).tolist() == [[1, 0, 1, 2, 3, 4], [1, 6, 7, 8, 9, 10]]
