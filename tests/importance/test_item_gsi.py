"""GSI over items: measured again after each step, resumable, with counted evaluations."""

import pytest

from rap_env.context.base import item_order
from rap_env.errors import ArtifactError
from rap_env.importance.gsi_search import gsi
from rap_env.importance.orders import PricedState, greedy_order, one_shot_costs, reference_costs
from rap_env.importance.profiles import GSIProfile
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.plan import Plan
from tests.envs.playing import LEVELS, make_v1, play
from tests.envs.tiny_contexts import make_ladder_context

CACHES = LEVELS["caches"]


@pytest.fixture(scope="module")
def context():
    return make_ladder_context()


def bytes_of(context, together=("int8",)) -> LadderBytes:
    return LadderBytes(context.memory, Ladder.of(context.memory.facts, LEVELS, together))


def run(context, ladder_bytes=None, **settings) -> GSIProfile:
    ladder_bytes = ladder_bytes or bytes_of(context)
    settings = {"method": "lazy", **settings}
    return gsi(
        context.scorer, ladder_bytes, context.level_costs(CACHES), progress=False, **settings
    )


def priced(context, ladder_bytes) -> PricedState:
    one_shot = one_shot_costs(context.level_costs(CACHES), ladder_bytes.ladder)
    return PricedState(reference_costs(ladder_bytes), one_shot)


def test_the_exact_search_takes_the_least_cost_per_byte_of_all_items(context):
    ladder_bytes = bytes_of(context)
    profile = run(context, ladder_bytes, method="exact", stop=8)
    ladder, before = ladder_bytes.ladder, context.scorer.dense_nll
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


def test_a_profile_of_other_levels_or_methods_is_rejected(context, tmp_path):
    path = tmp_path / "gsi.json"
    run(context, stop=1, path=path)
    with pytest.raises(ArtifactError, match="measured for other levels"):
        run(context, bytes_of(context, together=()), stop=2, path=path)
    with pytest.raises(ArtifactError, match="method='lazy' .*, not with 'exact'"):
        run(context, stop=2, path=path, method="exact")


def test_it_ends_when_nothing_frees_bytes(context):
    ladder_bytes = LadderBytes(context.memory, Ladder.of(context.memory.facts, "masks"))
    profile = run(context, ladder_bytes)
    assert sorted(profile.order) == [item.name for item in ladder_bytes.ladder.items]
    everything = Plan.of(dict.fromkeys(profile.order, "removed"))
    assert profile.nll_after[-1] == context.scorer.nll(everything)


def test_the_order_begins_with_the_measured_steps_and_is_complete(context):
    ladder_bytes, costs = bytes_of(context), context.level_costs(CACHES)
    profile, ladder = run(context, stop=6), ladder_bytes.ladder
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
    env = make_v1(context, reward={"name": "perplexity", "relative_to": "gsi"})
    assert len(list(tmp_path.glob("item-gsi-lazy-4-*.json"))) == 1
    order = item_order(context, env._task.encoder.ladder_bytes)
    observation, _ = env.reset(seed=0)
    place = {number: row[8] for number, row in enumerate(observation["ladder"])}
    assert min(place, key=place.__getitem__) == order.steps[0][0]
    _, *steps = play(env, 1, masked=True)
    baseline = env._task._baseline(env.current.start)
    expected = context.scorer.nll(baseline) - context.scorer.dense_nll
    assert steps[-1][-1]["baseline_delta_nll"] == pytest.approx(expected)

    (path,) = tmp_path.glob("item-gsi-*.json")
    by_path = make_ladder_context(importance=str(path))
    again = item_order(by_path, env._task.encoder.ladder_bytes)
    assert again.steps == order.steps
    assert make_ladder_context(importance="one_shot").importance == "one_shot"
