"""GSI: equal to the naive loop, resumable, rejected for another model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rap_env.context.base import item_order
from rap_env.errors import ArtifactError
from rap_env.importance.gsi_search import gsi
from rap_env.importance.orders import PricedState, greedy_order, one_shot_costs, reference_costs
from rap_env.importance.profiles import GSIProfile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.plan import Plan, block_name
from rap_env.scoring.scorer import PlanScorer
from rap_env.scoring.store import ScoreStore
from tests.envs.playing import LEVELS, make_ladder, play
from tests.envs.tiny_contexts import make_ladder_context
from tests.scoring.test_scorer import plain_nll, removals, scan, tokens
from tests.tiny import tiny_llm


def naive_order(llm, ids, count):
    """The loop as research code writes it: a whole forward pass for each candidate."""
    removed, order, levels = Plan(), [], []
    for _ in range(count):
        plans = removals(llm.num_blocks, removed)
        nll = {block: np.mean(plain_nll(llm, ids, plan)) for block, plan in plans.items()}
        order.append(min(nll, key=nll.__getitem__))
        levels.append(nll[order[-1]])
        removed = removed.without(order[-1])
    return order, levels


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_exact_gsi_is_the_naive_loop(seed):
    llm, ids = tiny_llm(layers=4, seed=seed), tokens()
    profile = gsi(PlanScorer(llm, ids), progress=False)
    order, levels = naive_order(llm, ids, 8)
    assert list(profile.order) == [block_name(block) for block in order]
    assert profile.nll_after == pytest.approx(levels, rel=2e-5)
    assert profile.evaluations == profile.evaluations_run == 1 + sum(range(1, 9))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gpt_neox", torch.bfloat16),
        ("mixtral", torch.float32),
    ],
)
def test_exact_gsi_equals_scans_of_all_blocks(family, dtype):
    llm = tiny_llm(family, layers=5, dtype=dtype)
    scorer = PlanScorer(llm, tokens(windows=6), batch_tokens=18)
    removed, order, levels = Plan(), [], []
    for _ in range(5):
        nll = scan(PlanScorer(llm, tokens(windows=6), batch_tokens=18), removed)
        order.append(min(nll, key=lambda block: (nll[block], block)))
        levels.append(nll[order[-1]])
        removed = removed.without(order[-1])
    profile = gsi(scorer, stop=5, progress=False)
    assert list(profile.order) == [block_name(block) for block in order]
    assert list(profile.nll_after) == levels  # bit for bit
    assert profile.candidates == tuple(10 - i for i in range(5))


@pytest.mark.parametrize(("good", "bad", "examined"), [(-9.0, -10.0, 15), (9.0, 10.0, 8)])
def test_lazy_measures_more_items_if_one_has_risen(good, bad, examined, tmp_path):
    """All of them if each loses more than any was last known to, else a few."""
    scorer, path = PlanScorer(tiny_llm(layers=8), tokens()), tmp_path / "gsi.json"
    nll = {block_name(block): value for block, value in scan(scorer, Plan.removing(0)).items()}
    next_to_it = "layer00.ffn"
    ranked = sorted(set(nll) - {next_to_it}, key=nll.__getitem__)
    known = dict.fromkeys(ranked[:7], good) | dict.fromkeys(ranked[7:], bad) | {next_to_it: 99.0}
    begun = gsi(scorer, stop=1, method="lazy", progress=False)
    replace(
        begun, order=("layer00.attn",), nll_after=(scorer.nll(Plan.removing(0)),), last_rises=known
    ).save(path)
    profile = gsi(scorer, stop=2, method="lazy", path=path, progress=False)
    assert profile.candidates[-1] == examined
    assert nll[profile.order[-1]] == min(nll.values())


def test_a_warm_store_does_not_reduce_the_reported_cost(tmp_path):
    llm, ids, store = tiny_llm(layers=3), tokens(), ScoreStore(tmp_path / "scores.sqlite")
    cold = gsi(PlanScorer(llm, ids, store), progress=False)
    warm = gsi(PlanScorer(llm, ids, store), progress=False)
    assert warm.evaluations == cold.evaluations == cold.evaluations_run
    assert warm.evaluations_run == 0


def test_the_profile_has_the_cost_of_each_block():
    llm, ids = tiny_llm(layers=3), tokens()
    scorer = PlanScorer(llm, ids)
    profile = gsi(scorer, stop=2, progress=False)
    assert len(profile.order) == 2
    first, second = profile.order_indices
    dense = scorer.native_nll
    single = [scorer.nll(Plan.removing(i)) - dense for i in range(6)]
    assert profile.first_pass == pytest.approx(single)
    assert profile.marginal_delta_nll[first] == pytest.approx(single[first])
    for other in set(range(6)) - {first}:
        rise = scorer.nll(Plan.removing(first, other)) - scorer.nll(Plan.removing(first))
        assert profile.marginal_delta_nll[other] == pytest.approx(rise)
    rest = sorted(set(range(6)) - {first, second}, key=lambda i: profile.marginal_delta_nll[i])
    assert profile.full_order == (first, second, *rest)
    assert profile.rank[first] == 0
    assert profile.rank[rest[-1]] == 1


@pytest.mark.parametrize("method", ["exact", "lazy"])
def test_interrupted_and_resumed_gives_the_same_result(method, tmp_path):
    llm, ids, path = tiny_llm(layers=4), tokens(windows=4), tmp_path / "gsi.json"
    whole = gsi(PlanScorer(llm, ids), method=method, progress=False)
    gsi(PlanScorer(llm, ids), stop=2, method=method, path=path, progress=False)
    scorer = PlanScorer(llm, ids)
    continued = gsi(scorer, method=method, path=path, progress=False)
    assert scorer.evaluations == sum(whole.candidates[2:])  # neither dense nor the first rounds
    taken = [Plan.removing(*whole.order_indices[:n]) for n in range(1, 1 + len(whole.order))]
    assert list(whole.nll_after) == scorer.nll_many(taken)
    for name in ("order", "nll_after", "candidates", "evaluations"):
        assert getattr(continued, name) == getattr(whole, name)
    assert GSIProfile.load(path, llm) == continued
    with pytest.raises(ArtifactError, match=f"method='{method}' on .*, not with"):
        gsi(scorer, method={"exact": "lazy", "lazy": "exact"}[method], path=path, progress=False)


def test_another_models_artifact_is_rejected(tmp_path):
    path = tmp_path / "gsi.json"
    gsi(PlanScorer(tiny_llm(), tokens()), stop=1, path=path, progress=False)
    for other in (tiny_llm(seed=1), tiny_llm(dtype=torch.bfloat16)):
        with pytest.raises(ArtifactError, match="other weights or another dtype"):
            GSIProfile.load(path, other)
    with pytest.raises(ArtifactError, match="not with 'exact' on this text"):
        gsi(PlanScorer(tiny_llm(), tokens(seed=1)), path=path, progress=False)


@pytest.fixture(scope="module")
def context():
    return make_ladder_context()


def bytes_of(context, together=("int8",)) -> LadderBytes:
    return LadderBytes(context.memory, Ladder.of(context.memory.facts, LEVELS, together))


def run(context, ladder_bytes=None, **settings) -> GSIProfile:
    ladder_bytes = ladder_bytes or bytes_of(context)
    settings = {"method": "lazy", **settings}
    costs = context.level_costs(bytes_of(context).ladder)
    return gsi(context.scorer, ladder_bytes, costs, progress=False, **settings)


def priced(context, ladder_bytes) -> PricedState:
    one_shot = one_shot_costs(context.level_costs(bytes_of(context).ladder), ladder_bytes.ladder)
    return PricedState(reference_costs(ladder_bytes), one_shot)


def test_the_exact_search_takes_the_least_cost_per_byte_of_all_items(context):
    ladder_bytes = bytes_of(context)
    profile = run(context, ladder_bytes, method="exact", stop=8)
    ladder, before = ladder_bytes.ladder, context.scorer.native_nll
    state = priced(context, ladder_bytes)
    for name, nll, count in zip(profile.order, profile.nll_after, profile.candidates, strict=True):
        prices = {}
        for item in filter(state.is_valid, range(len(ladder))):
            if state.companions(item)[0] == item and state.step_bytes(item) > 0:
                rise = context.scorer.nll(ladder.plan(state.positions_after(item))) - before
                prices[ladder.items[item].name] = max(0.0, rise) / state.step_bytes(item)
        assert prices[name] == min(prices.values())
        assert count == len(prices)
        state.lower(ladder.numbers[name])
        before = nll
        assert nll == context.scorer.nll(state.plan)
    assert profile.evaluations == 1 + sum(profile.candidates)


def test_the_lazy_search_measures_fewer_plans(context):
    exact, lazy = run(context, method="exact", stop=10), run(context, method="lazy", stop=10)
    assert len(lazy.order) == 10
    assert lazy.evaluations < 0.8 * exact.evaluations
    assert lazy.nll_after[-1] < exact.nll_after[-1] + 0.5


def test_a_profile_of_other_levels_is_rejected(context, tmp_path):
    path = tmp_path / "gsi.json"
    run(context, stop=1, path=path)
    with pytest.raises(ArtifactError, match="measured for other levels"):
        run(context, bytes_of(context, together=()), stop=2, path=path)


def test_it_ends_when_nothing_frees_bytes(context):
    ladder_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, "masks"))
    profile = run(context, ladder_bytes)
    assert sorted(profile.order) == [item.name for item in ladder_bytes.ladder.items]
    everything = Plan.of(dict.fromkeys(profile.order, "removed"))
    assert profile.nll_after[-1] == context.scorer.nll(everything)


def test_the_order_begins_with_the_measured_steps_and_is_complete(context):
    ladder_bytes = bytes_of(context)
    profile, ladder = run(context, stop=6), ladder_bytes.ladder
    costs = context.level_costs(ladder)
    order = greedy_order(costs, ladder_bytes, profile)
    state = priced(context, ladder_bytes)
    for name in profile.order:
        state.lower(ladder.numbers[name])
    reached = [0] * len(ladder)
    for number, (item, position) in enumerate(order.steps):
        if number == sum(state.positions):
            assert reached == state.positions
        reached[item] = position
    assert ladder.plan(reached) == ladder.lowest
    with pytest.raises(ArtifactError, match="measured for other levels"):
        greedy_order(costs, bytes_of(context, together=()), profile)


def test_environments_observe_it(tmp_path):
    context = make_ladder_context(
        importance="gsi", gsi_method="lazy", gsi_removals=4, folder=tmp_path
    )
    env = make_ladder(context, reward={"name": "perplexity", "relative_to": "gsi"})
    assert len(list(tmp_path.glob("item-gsi-lazy-4-*.json"))) == 1
    order = item_order(context, env._task.encoder.ladder_bytes)
    observation, _ = env.reset(seed=0)
    place = {number: row[8] for number, row in enumerate(observation["ladder"])}
    assert min(place, key=place.__getitem__) == order.steps[0][0]
    _, *steps = play(env, 1, masked=True)
    baseline = env._task._baseline(env.current.start)
    expected = context.scorer.nll(baseline) - context.scorer.native_nll
    assert steps[-1][-1]["baseline_delta_nll"] == pytest.approx(expected)

    (path,) = tmp_path.glob("item-gsi-*.json")
    by_path = make_ladder_context(importance=str(path))
    again = item_order(by_path, env._task.encoder.ladder_bytes)
    assert again.steps == order.steps
    assert make_ladder_context(importance="one_shot").importance == "one_shot"
