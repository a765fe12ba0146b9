"""Costs of levels: factors, windows, artifacts, and the scan that measures them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_costs import LevelCosts, window_share
from rap_env.importance.level_scan import measure_jointly, scan_levels
from rap_env.levels import CacheLevel
from rap_env.plan import Plan
from tests.policies.test_knapsack import costs, facts

SINGLE = {"int8": 0.01, "int4": 0.1, "int2": 0.5, "int4-window64": 0.3, "removed": 1.0}


class FakeScorer:
    """Gives each level a price, and twice the sum to plans with more than one."""

    def __init__(self, made, length=512, scale=None):
        self.scale = scale or {}
        self.uneven = 1.0 if scale else 0.75  # rise of the first window, where 1 is the mean
        self.llm = SimpleNamespace(facts=made)
        self.corpus = SimpleNamespace(tokens=np.zeros((2, length), dtype=int))
        self.evaluations = 0
        self.block_forwards = 0.0
        self.provenance = {
            "model": "made", "fingerprint": made.fingerprint, "scoring": {"weights": made.weights},
            "text": {"windows": 2, "window_tokens": length, "source": "self"},
        }  # fmt: skip

    def nll_many(self, plans, on_score=None):
        self.evaluations += len(set(plans))

    def nll(self, plan):
        return float(self.window_nll(plan).mean())

    def window_nll(self, plan):
        total = sum(SINGLE[n] * self.scale.get(item, 1.0) for item, n in plan.levels.items())
        rise = total * (2 if len(plan.levels) > 1 else 1)
        return np.array([3.0 + rise * self.uneven, 3.0 + rise * (2 - self.uneven)])


def scanned(length=512, levels=("int8", "int4", "int4-window64"), together=()):
    scorer = FakeScorer(facts(packed=True), length)
    return scan_levels(scorer, levels, together=together, progress=False)


def test_a_scan_measures_each_level_of_each_item_alone_and_uniform_levels_jointly():
    made = scanned()
    assert made.native_nll == 3.0
    assert made.window_tokens == 512
    assert set(made.one_shot) == {
        "layer00.attn", "layer00.ffn", "layer01.attn", "layer01.ffn", "layer00.cache",
        "layer01.cache", "embeddings",
    }  # fmt: skip
    assert made.one_shot["layer01.ffn"] == pytest.approx({"removed": 1.0})
    assert made.one_shot["layer01.cache"] == pytest.approx(
        {"int8": 0.01, "int4": 0.1, "int4-window64": 0.3}
    )
    assert made.errors["layer01.ffn"] == pytest.approx({"removed": 0.25})
    uniform = Plan.uniform(2, caches="int4").to_json()
    assert made.joint[uniform] == pytest.approx(0.4)
    assert len(made.joint) == 3
    assert made.evaluations == made.evaluations_run == 1 + 4 + 6 + 3


def test_joint_measurements_correct_the_sum():
    made = scanned()
    assert made.fitted.factors == pytest.approx(
        {"cache int8": 2.0, "cache int4": 2.0, "cache int4-window64": 2.0}
    )
    for row in made.predictions():
        assert row["predicted"] == pytest.approx(row["measured"])
    assert made.delta_nll(Plan.of({"layer00.cache": "int4"})) == pytest.approx(0.2)


def test_windows_that_hold_the_whole_text_are_not_measured():
    assert "int4-window64" not in scanned(length=128).one_shot["layer00.cache"]
    assert "int4-window64" in scanned(length=129).one_shot["layer00.cache"]


def test_the_share_of_tokens_that_a_window_affects():
    """A token is affected once the cache holds fewer groups than came before its own."""
    for name in ("window64", "int4-window96"):
        level = CacheLevel.of(name)
        for tokens in (1, 127, 128, 129, 160, 161, 300):
            seen = [level.groups_held(t) < (t - 1) // 32 for t in range(1, tokens + 1)]
            assert window_share(level, tokens) == pytest.approx(np.mean(seen))
    assert window_share(CacheLevel.of("int4"), 10**6) == 0


def test_more_plans_may_be_measured_later():
    made = scanned()
    plan = Plan.of({"layer00.cache": "int8", "layer01.ffn": "removed"})
    more = measure_jointly(made, FakeScorer(facts(packed=True)), [plan], progress=False)
    assert more.joint[plan.to_json()] == pytest.approx(2.02)
    assert more.one_shot == made.one_shot
    assert more.evaluations == made.evaluations + 2
    assert made.fitted.factors.items() <= more.fitted.factors.items()
    # The plan cost 2.02, of which the cache is predicted to cost 0.02, so the removal of the
    # block, which costs 1 alone, cost 2; a preference for 1 keeps its factor a little below.
    assert 1.8 < more.fitted.factors["ffn removed"] < 2
    assert more.fitted.factors["attn removed"] == pytest.approx(1)


def changed(**one_shot):
    """Costs that were measured alone only, some of them changed."""
    made = replace(scanned(), joint={})
    errors = {item: dict.fromkeys(costs, 0.0) for item, costs in made.errors.items()}
    items = {item: {**costs, **one_shot.get(item.replace(".", "_"), {})}
             for item, costs in made.one_shot.items()}  # fmt: skip
    return replace(made, one_shot=items, errors=errors)


def test_a_level_costs_at_least_as_much_as_each_more_exact_one():
    """Noise makes some levels look better than more exact ones, and a removal look free."""
    made = changed(
        layer00_cache={"int8": 0.2, "int4": 0.1, "int4-window64": 0.05}, layer00_attn={"removed": 0}
    )
    for level in ("int8", "int4", "int4-window64"):
        assert made.cost("layer00.cache", level) == 0.2
    assert made.cost("layer00.attn", "removed") == 0.2
    assert made.cost("layer01.cache", "int8") == pytest.approx(0.01)
    unordered = changed(layer00_cache={"int8": 0.01, "int4": 0.5, "int4-window64": 0.3})
    assert unordered.cost("layer00.cache", "int8") == 0.01
    assert unordered.cost("layer00.cache", "int4-window64") == 0.5


def test_noise_is_shrunk_to_the_mean():
    """Half of the variance of the costs is noise, so they move half of the way."""
    made = changed(layer00_cache={"int4": 0.3}, layer01_cache={"int4": 0.5})
    some = {
        n: {**made.errors[n], "int4": 0.1 * 0.5**0.5} for n in ("layer00.cache", "layer01.cache")
    }
    noisy = replace(made, errors={**made.errors, **some})
    assert noisy.cost("layer00.cache", "int4") == pytest.approx(0.35)
    assert noisy.cost("layer01.cache", "int4") == pytest.approx(0.45)
    assert made.cost("layer01.cache", "int4") == pytest.approx(0.5)


def test_levels_below_the_noise_have_shares_of_the_cost_of_all_caches():
    """Shares are in proportion to the first less exact level that was measured alone."""
    made = scanned(together=("int8", "int4"))
    for layer in ("layer00.cache", "layer01.cache"):
        assert made.one_shot[layer] == pytest.approx(
            {"int8": 2 * 0.01, "int4": 2 * 0.1, "int4-window64": 0.3}
        )
        assert made.errors[layer]["int4"] == 0 < made.errors[layer]["int4-window64"]
        assert made.cost(layer, "int4") == pytest.approx(0.2)
    assert made.evaluations == scanned().evaluations - 4
    scorer = FakeScorer(facts(packed=True), scale={"layer00.cache": 3.0})
    made = scan_levels(scorer, ("int4", "int2"), together=("int4",), progress=False)
    assert made.one_shot["layer00.cache"] == pytest.approx({"int2": 1.5, "int4": 0.6})
    assert made.one_shot["layer01.cache"] == pytest.approx({"int2": 0.5, "int4": 0.2})
    alone = scan_levels(scorer, ("int4",), together=("int4",), progress=False)
    assert alone.one_shot["layer01.cache"] == pytest.approx({"int4": 0.4})


def test_levels_without_a_measurement_are_rejected():
    with pytest.raises(UnknownNameError, match="measured level of layer00.cache 'int2'"):
        scanned().cost("layer00.cache", "int2")
    assert scanned().cost("layer00.cache", "native") == 0


def test_a_window_that_holds_all_of_the_text_costs_what_its_precision_costs():
    """It was not measured, since it computes the same on a text of that length."""
    made = changed(layer00_cache={"int8": 0.1, "int4": 0.2})
    whole = f"window{made.window_tokens}"
    assert made.cost("layer00.cache", f"int4-{whole}") == made.cost("layer00.cache", "int4") > 0
    assert made.cost("layer00.cache", whole) == 0
    with pytest.raises(UnknownNameError, match="measured level"):
        made.cost("layer00.cache", f"int4-{whole}", seq_len_tokens=2 * made.window_tokens)


def test_unknown_items_are_rejected():
    with pytest.raises(ArtifactError, match=r"layer02\.attn"):
        costs(facts(3)).__class__(**{**vars(costs(facts(3))), "num_layers": 2})


def test_artifacts_load_only_for_their_model(tmp_path):
    path = tmp_path / "levels.json"
    made = scanned()
    made.save(path)
    live = SimpleNamespace(facts=facts(packed=True))
    assert LevelCosts.load(path, live) == made
    with pytest.raises(ArtifactError, match="other weights"):
        LevelCosts.load(path, SimpleNamespace(facts=facts(packed=True, fingerprint="b" * 64)))
    with pytest.raises(ArtifactError, match="unquantised"):
        LevelCosts.load(path, SimpleNamespace(facts=facts()))
