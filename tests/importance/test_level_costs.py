"""Costs of levels: sums, windows, order, artifacts, and those of the packaged files."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rap_env.artifacts import digest
from rap_env.context.live import PACKAGED_COSTS
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.level_costs import LevelCosts, ordered_costs, window_share
from rap_env.levels import CacheLevel
from rap_env.plan import Plan
from rap_env.policies.packaged_files import default_facts
from rap_env.scoring.score_table import ScoreTable, packaged_tables
from tests.policies.test_knapsack import costs, facts

MADE = facts(packed=True)

PINNED = {
    "gemma3-270m.native": "e9d6f46aaac1160c7c3f1b1fe9b5ae40795dc4c90effb82a92e6601816e16d44",
    "smollm2-135m-low-bits.native": (
        "17a10c2fd7cb4db22225a861573ba5f5e1d50b0e39a8385d9c31245e53efe718"
    ),
    "smollm2-135m.native": "e526870234c61ae04176a6f8c4128406a65611599488fc8ebc885dc6a0032f22",
}
"""Digests of the costs of the packaged tables, which fits to measurements gave until d967b580.

What agents observe in pinned tasks, and what tables predict, depends on each bit of them.
"""


def test_the_costs_of_pinned_tasks_are_what_they_have_always_been():
    tables = {path.stem: ScoreTable.load(path).levels for path in packaged_tables()}
    found = {name: LevelCosts(**levels).costs for name, levels in tables.items() if levels}
    assert {name: digest(levels) for name, levels in found.items()} == PINNED
    loaded = LevelCosts.load(PACKAGED_COSTS, SimpleNamespace(facts=default_facts()))
    assert loaded.window_tokens == 1024


def test_a_plan_costs_the_sum_of_its_levels():
    plan = Plan.of({"layer00.cache": "int4", "layer01.ffn": "removed"})
    made = costs(MADE)
    expected = made.costs["layer00.cache"]["int4"] + made.costs["layer01.ffn"]["removed"]
    assert made.delta_nll(plan) == expected
    assert made.cost("layer00.cache", "native") == 0


def test_the_share_of_tokens_that_a_window_affects():
    """A token is affected once the cache holds fewer groups than came before its own."""
    for name in ("window64", "int4-window96"):
        level = CacheLevel.of(name)
        for tokens in (1, 127, 128, 129, 160, 161, 300):
            seen = [level.groups_held(t) < (t - 1) // 32 for t in range(1, tokens + 1)]
            assert window_share(level, tokens) == pytest.approx(np.mean(seen))
    assert window_share(CacheLevel.of("int4"), 10**6) == 0


def test_a_level_costs_at_least_as_much_as_each_more_exact_one():
    """Noise makes some levels look better than more exact ones, and a removal look free."""
    found = ordered_costs(
        {
            "layer00.cache": {"int4-window64": 0.05, "int8": 0.2, "int4": 0.1},
            "layer01.cache": {"int8": 0.01, "int4": 0.5, "int4-window64": 0.3},
            "layer00.attn": {"int8": -0.1, "removed": 0.0},
            "layer01.attn": {"int8": 0.7, "removed": 0.6},
            "layer01.ffn": {"int8": 0.7, "removed": 0.9},
        }
    )
    assert found == {
        "layer00.cache": {"int4-window64": 0.2, "int8": 0.2, "int4": 0.2},
        "layer01.cache": {"int8": 0.01, "int4": 0.5, "int4-window64": 0.5},
        "layer00.attn": {"int8": 0.0, "removed": 0.2},
        "layer01.attn": {"int8": 0.7, "removed": 0.7},
        "layer01.ffn": {"int8": 0.7, "removed": 0.9},
    }


def test_levels_without_a_cost_are_rejected():
    with pytest.raises(UnknownNameError, match="measured level of layer00.cache 'int2'"):
        costs(MADE).cost("layer00.cache", "int2")


def test_a_window_that_holds_all_of_the_text_costs_what_its_precision_costs():
    """It has no cost of its own, since it computes the same on a text of that length."""
    made = costs(MADE)
    whole = f"window{made.window_tokens}"
    assert made.cost("layer00.cache", f"int4-{whole}") == made.cost("layer00.cache", "int4") > 0
    assert made.cost("layer00.cache", whole) == 0
    with pytest.raises(UnknownNameError, match="measured level"):
        made.cost("layer00.cache", f"int4-{whole}", seq_len_tokens=2 * made.window_tokens)


def test_unknown_items_are_rejected():
    with pytest.raises(ArtifactError, match=r"layer02\.attn"):
        replace(costs(facts(3)), num_layers=2)


def test_artifacts_load_only_for_their_model(tmp_path):
    path = tmp_path / "levels.json"
    made = costs(MADE)
    made.save(path)
    assert LevelCosts.load(path, SimpleNamespace(facts=MADE)) == made
    other = facts(packed=True, fingerprint="b" * 64)
    with pytest.raises(ArtifactError, match="other weights"):
        LevelCosts.load(path, SimpleNamespace(facts=other))
    with pytest.raises(ArtifactError, match="unquantised"):
        LevelCosts.load(path, SimpleNamespace(facts=facts()))


def test_sums_by_level_go_from_the_most_to_the_least_exact_level():
    made = replace(
        costs(MADE),
        costs={
            "embeddings": {"int3": 0.5, "int8": 0.1},
            "layer01.cache": {"int4-window128": 2.0, "int2": 1.0, "int4": 0.25, "int8": 0.0},
            "layer00.ffn": {"removed": 3.0, "int2": 1.5, "int4-compact": 0.5},
            "layer01.ffn": {"int2": 0.5},
        },
    )
    sums = made.sums_by_level()
    assert list(sums) == ["ffn", "cache", "embeddings"]
    assert list(sums["ffn"].items()) == [("int4-compact", 0.5), ("int2", 2.0), ("removed", 3.0)]
    assert list(sums["cache"]) == ["int8", "int4", "int2", "int4-window128"]
