"""`RAPLadder-v0`: its episodes, and that those of removals alone are those of `RAPPrune-v0`."""

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError
from rap_env.ladder.features import ITEM_FEATURES
from rap_env.plan import Plan
from rap_env.request import Request
from tests.envs.playing import DENSE_TIMING, make, make_ladder, play

SAME = ("peak_bytes", "request", "reward_terms", "nll")


class TestSameAsV0:
    """With weights native or removed and native caches, it has the episodes of RAPPrune."""

    @pytest.mark.parametrize(
        "reward", ["perplexity", DENSE_TIMING, {"name": "perplexity", "scale": "log"}], ids=str
    )
    @pytest.mark.parametrize("workload", ["grid", "azure-conv"])
    def test_masks_have_the_same_episodes(self, reward, workload, context):
        shared = {"reward": reward, "workload": workload}
        old, new = (
            make(context, **shared),
            make_ladder(context, levels="masks", over_budget="measured", **shared),
        )
        assert old.action_space == new.action_space
        for seed in range(3):
            for masked in (False, True):
                expected, found = play(old, seed, masked), play(new, seed, masked)
                assert len(found) == len(expected)
                for (seen, *rest, info), (seen_v0, *rest_v0, info_v0) in zip(
                    found, expected, strict=True
                ):
                    assert rest == rest_v0  # rewards and ends
                    for key in SAME:
                        assert info.get(key) == info_v0.get(key)
                    assert info.get("delta_nll") == info_v0.get("loss")
                    assert np.array_equal(seen["action_mask"], seen_v0["action_mask"])
                    assert np.array_equal(seen["request"], seen_v0["request"])
                    freed = seen["ladder"][:, ITEM_FEATURES.index("freed_share")]
                    assert np.array_equal(freed, seen_v0["blocks"][:, 3])
                    removed = [n for n, level in enumerate(info["levels"]) if level == "removed"]
                    assert Plan.removing(*removed) == Plan.removing(*info_v0["removed"])


class TestEpisode:
    @pytest.mark.parametrize("seed", range(8))
    def test_valid_actions_lower_items_until_the_request_fits(self, ladder, seed):
        env = make_ladder(ladder, reward=DENSE_TIMING)
        (_, start), *steps = play(env, seed, masked=True)
        assert set(start["levels"]) == {"native"}
        request = Request(**start["request"])
        before = Plan()
        for seen, _, terminated, truncated, info in steps:
            plan = plan_of(env, info)
            changed = {k: v for k, v in plan.levels.items() if before.levels.get(k) != v}
            assert len(changed) == 1  # a removed block's cache is no longer named
            assert ladder.memory.peak_bytes(plan, request) == info["peak_bytes"]
            assert terminated == (info["peak_bytes"] <= request.budget_bytes)
            assert not truncated
            assert info["nll"] == pytest.approx(ladder.scorer.nll(plan))
            assert env.observation_space.contains(seen)
            before = plan
        assert steps[-1][2]
        assert env.plan == before

    def test_requests_that_no_level_helps_are_rejected(self, ladder):
        env = make_ladder(ladder, levels={"caches": ["int8"]}, importance="none")
        short = {"batch_size": 1, "seq_len_tokens": 20, "budget_fraction": 0.9}
        with pytest.raises(InvalidRequestError, match="no fewer bytes .* longer sequence"):
            env.reset(options={"request": short})
        fixed = {"name": "fixed", **short}
        blind = make_ladder(ladder, levels={"caches": ["int8"]}, importance="none", workload=fixed)
        with pytest.raises(InvalidRequestError, match="None of 100 requests .* longer sequence"):
            blind.reset(seed=0)


def plan_of(env, info) -> Plan:
    levels = zip(env.ladder.items, info["levels"], strict=True)
    return Plan.of({i.name: n for i, n in levels if not (i.kind == "cache" and n == "removed")})
