"""Budgets at which uniform settings lose given amounts, found on a tiny model."""

import pytest
import yaml

from experiments.config.common import ImportanceConfig, parse_pinned
from experiments.config.program_settings import EnvSettings, EvaluateConfig, TightGridConfig
from experiments.contexts import build_context, make_ladder_bytes
from experiments.study.console import ExperimentError
from experiments.tight_grid import tight_budgets, tight_grid
from rap_env.policies.method import Basis
from rap_env.policies.uniform import Uniform
from rap_env.request import Request
from tests.experiments.tiny_study import own_text, tiny_study

LEVELS = {"weights": ["int8", "int4", "removed"], "caches": ["int8", "int4"]}
SHAPES = ((1, 16), (4, 60))
LOSSES = [0.06, 0.15, 0.3]


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, stage="tight_grid", calibration=own_text(2, 48),
        importance=ImportanceConfig(method="one_shot", gsi_method="lazy"),
        env=EnvSettings(id="RAPLadder-v0", levels=LEVELS, together=["int8"]),
        tight_grid=TightGridConfig(
            requests=[f"{b}x{t}" for b, t in SHAPES], losses=LOSSES, out=str(base / "tight.yaml")
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def baseline(config):
    context = build_context(config)
    return Uniform(Basis(context, make_ladder_bytes(config, context)))


@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:])]
)
def test_a_good_setting_needs_all_of_its_budget_and_no_other_is_nearer(baseline, shape):
    tight = tight_budgets(baseline, shape, LOSSES)
    assert [budget.pinned.target_delta_nll for budget in tight] == LOSSES
    budgets = [budget.pinned.budget_bytes for budget in tight]
    assert budgets == sorted(set(budgets), reverse=True)
    scorer = baseline.context.scorer
    every = []
    for size in baseline.all_peak_bytes(shape):
        plan = baseline.settings(Request(*shape, budget_bytes=size))[0].plan
        every.append(scorer.nll(plan) - scorer.native_nll)
    for budget in tight:
        request = Request(*shape, budget_bytes=budget.pinned.budget_bytes)
        assert baseline.memory.peak_bytes(budget.plan, request) == request.budget_bytes
        assert baseline.settings(request)[0].plan == budget.plan
        assert budget.delta_nll in [pytest.approx(loss) for loss in every]


def test_the_fragment_is_read_by_the_evaluation(config):
    path = tight_grid(config, config.stage_dir("tight_grid"))
    text = path.read_text()
    assert "python -m experiments.tight_grid experiment=tiny" in text
    assert text.startswith("# @package _global_\n")
    pinned = yaml.safe_load(text)["evaluate"]["pinned"]
    assert len(pinned) == len(SHAPES) * len(LOSSES)
    cells = EvaluateConfig(requests=[], budgets=[], pinned=pinned).pinned_cells
    assert [cell.shape for cell in cells] == [shape for shape in SHAPES for _ in LOSSES]
    assert [str(parse_pinned(text)) for text in pinned] == pinned
    before = path.read_bytes()
    assert tight_grid(config, config.stage_dir("tight_grid")).read_bytes() == before


def test_too_few_settings_are_rejected(baseline):
    with pytest.raises(ExperimentError, match="too few for a budget of its own"):
        tight_budgets(baseline, SHAPES[0], [0.15 + number * 1e-9 for number in range(40)])
