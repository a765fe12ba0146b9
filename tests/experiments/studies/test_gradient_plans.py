"""Plans from costs by gradient of a tiny real model, beside those of a score table."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from experiments.config.common import TextConfig
from experiments.config.program_settings import EnvConfig, EvaluateConfig
from experiments.config.study_settings import GradientPlansConfig
from experiments.contexts import build_context
from experiments.studies.gradient_plans import (
    ALL,
    CALIBRATION,
    CODE,
    COSTS_FILE,
    GRADIENT,
    ONE_BY_ONE,
    STUDY,
    GradientPlanRow,
    plan_tables,
)
from experiments.study.table_format import document
from rap_env.importance.level_costs import LevelCosts
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.score_table import ScoreTable
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.tiny_study import LEVELS, tiny_study
from tests.scoring.tiny_table import all_masks, table_of

TOKENS = 20


@pytest.fixture(scope="module")
def config(base):
    """Budgets that need levels, and a score table whose costs are the same for all items."""
    (base / "tale").mkdir()
    (base / "tale" / "text.txt").write_text("an old tale and a new one\n" * 40)
    own = tiny_study(
        base, layers=3, stage="gradient_plans", env=EnvConfig(id="RAPLadder-v0", levels=LEVELS)
    )
    context = build_context(own)
    masks = table_of(context, all_masks(6))
    levels = {"int8": 0.01, "int4": 0.02, "removed": 0.5}
    items = {"attn": ("int8", "removed"), "ffn": ("int8", "removed"), "cache": ("int8", "int4")}
    costs = {
        f"layer{n:02d}.{kind}": {name: levels[name] for name in names}
        for n in range(3)
        for kind, names in items.items()
    }
    made = LevelCosts(
        num_layers=3, window_tokens=TOKENS, native_nll=1.0, joint={}, evaluations=7,
        evaluations_run=7, block_forwards=42.0, seconds=1.0, provenance={},
        costs={**costs, "embeddings": {"int8": 0.01}},
    )  # fmt: skip
    replace(masks, levels=asdict(made)).save(base / "table.json")
    peak = context.memory.dense_peak_bytes(2, 64)
    text = TextConfig(str(base / "tale" / "text.txt"), windows=2, window_tokens=TOKENS)
    code = [TextConfig(f"{name}.py", 1, TOKENS) for name in ("argparse", "inspect")]
    return replace(
        own,
        evaluate=EvaluateConfig(
            requests=[],
            budgets=[],
            pinned=[f"2x64@{peak * 8 // 10}~0.1", f"2x64@{peak * 6 // 10}~1"],
        ),
        gradient_plans=GradientPlansConfig(str(base / "table.json"), 2, TOKENS, [text, *code]),
    )


def test_plans_of_both_costs_are_measured_on_all_texts(config):
    folder = config.stage_dir(config.stage)
    rows = GradientPlanRow.read(STUDY.run(config, folder))
    assert [row.costs for row in rows] == [ONE_BY_ONE] * 2 + [GRADIENT] * 2
    llm = build_context(config).llm
    text = CorpusConfig(config.gradient_plans.texts[0].source, 2, TOKENS, role="report")
    scorer = PlanScorer(llm, load_corpus(text, llm))
    costs = {
        ONE_BY_ONE: LevelCosts(**ScoreTable.load(config.gradient_plans.measured).levels),
        GRADIENT: LevelCosts.load(folder / COSTS_FILE, llm),
    }
    for row in rows:
        plan = Plan.of(row.levels)
        assert plan
        rise = scorer.window_nll(plan) - scorer.window_nll(Plan())
        assert row.window_delta_nll["tale"] == pytest.approx(rise.tolist(), abs=1e-6)
        assert {n: len(values) for n, values in row.window_delta_nll.items()} == {
            CALIBRATION: 2, "tale": 2, CODE: 2,
        }  # fmt: skip
        expected = sum(costs[row.costs].costs[item][name] for item, name in row.levels.items())
        assert row.predicted_delta_nll == pytest.approx(expected)
        assert row.evaluations == costs[row.costs].evaluations
    made = (folder / COSTS_FILE).read_bytes()
    STUDY.run(config, folder)
    assert (folder / COSTS_FILE).read_bytes() == made, "a resumed run takes the costs it has"


def row(costs, budget, predicted, uniform, windows):
    return GradientPlanRow(costs, budget, {}, predicted, uniform, 5, windows)


def test_tables_compare_means_over_budgets():
    def losses(own, code):
        return {CALIBRATION: [own], "tale": [own, own], "code": [code, code]}

    rows = [
        row(ONE_BY_ONE, "a", 0.1, 0.2, losses(0.1, 0.3)),
        row(ONE_BY_ONE, "b", 2.0, 2.0, losses(1.0, 1.0)),
        row(GRADIENT, "a", 0.1, 0.2, losses(0.05, 0.15)),
        row(GRADIENT, "b", 1.0, 2.0, losses(1.0, 1.5)),
    ]
    text = document(plan_tables(rows))
    assert "| 1 mild | tale | 0.1000 | 0.0500 | -50.0 % |" in text
    # The means are 0.65 and 0.825; each budget alike, half as much and half as much again.
    assert "| 2 | code | 0.6500 | 0.8250 | +26.9 % | 0.866 |" in text
    assert "| 1 mild | all | 0.2000 | 0.1000 |" in text
    assert "| One by one | 1.000 | 50.0 % | 1.91 | 5 |" in text
    assert "| By gradient | 1.000 | 50.0 % | 1.05 | 5 |" in text
    assert "| b | 1.0000 | 1.2500 | +25.0 %" in text
    assert np.mean(rows[3].on(ALL)) == 1.25
