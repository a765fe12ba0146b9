"""The knapsack over levels: best plans, exact bytes, and costs that depend on the length."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.importance.level_costs import LevelCosts, ordered_costs
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name
from rap_env.policies.knapsack import KnapsackPolicy, MultipleChoice
from rap_env.policies.loading import make_method
from rap_env.request import Request
from tests.agents.synthetic import SyntheticContext
from tests.made_facts import made_facts
from tests.masks import every_mask
from tests.policies.requests import fits, needing

CACHES = ("int8", "int4", "int4-window64")


def facts(layers=2, packed=False, widen_bytes=700, **changed):
    """Layers with unequal bytes, two key and value heads of 32 channels, levels everywhere."""
    native = tuple(4000 + 1000 * (i % 3) for i in range(2 * layers))
    levels = {} if packed else {"int8": tuple(n // 2 for n in native)}
    levels |= {} if packed else {"int4": tuple(n // 3 for n in native)}
    values = {
        "block_param_bytes": native,
        "base_bytes": 9000,
        "kv_bytes_per_token": (256,) * layers,
        "ffn_width": 40,
        "vocab_size": 10,
        "weights": "packed" if packed else "unquantised",
        "level_param_bytes": levels,
        "level_base_bytes": {} if packed else {"int8": 4500},
        "widen_bytes": widen_bytes,
        "kv_heads": (2,) * layers,
        "kv_head_size": (32,) * layers,
    }
    return made_facts(layers, **{**values, **changed})


def costs(made, seed=0, caches=CACHES, joint=None, window_tokens=512):
    """Random costs that rise from level to level."""
    rng = np.random.default_rng(seed)
    items = {
        block_name(i): [n for n in made.weight_levels(i) if n != "native"]
        for i in range(made.num_blocks)
    }
    items |= {cache_name(n): list(caches) for n in range(made.num_layers)}
    items[EMBEDDINGS] = [n for n in made.embedding_levels if n != "native"]
    one_shot = {
        item: dict(zip(levels, np.cumsum(rng.random(len(levels))).tolist(), strict=True))
        for item, levels in items.items()
    }
    return LevelCosts(
        num_layers=made.num_layers, window_tokens=window_tokens, native_nll=3.0,
        costs=ordered_costs(one_shot), joint=joint or {}, evaluations=1, evaluations_run=1,
        block_forwards=1.0, seconds=0.0,
        provenance={"model": "made", "fingerprint": made.fingerprint,
                    "scoring": {"weights": made.weights},
                    "text": {"windows": 1, "window_tokens": window_tokens, "source": "self"}},
    )  # fmt: skip


def every_plan(made, caches=CACHES):
    """All plans of a small model."""
    blocks = []
    for index in range(made.num_blocks):
        options = []
        for weights in made.weight_levels(index):
            levels = {block_name(index): weights}
            with_cache = index % 2 == 0 and weights != "removed"
            for cache in ("native", *caches) if with_cache else ("native",):
                options.append(levels | ({cache_name(index // 2): cache} if with_cache else {}))
        blocks.append(options)
    blocks.append([{EMBEDDINGS: level} for level in made.embedding_levels])
    for chosen in itertools.product(*blocks):
        yield Plan.of({k: v for part in chosen for k, v in part.items()})


@pytest.mark.parametrize("made", [facts(), facts(packed=True)])
@pytest.mark.parametrize("shape", [pytest.param((1, 20), marks=pytest.mark.slow), (2, 700)])
def test_plans_are_the_best_of_all_that_fit(made, shape):
    memory, known = MemoryModel(made), costs(made)
    policy = KnapsackPolicy(memory, known)
    unbounded = Request(*shape, 1)
    plans = list(every_plan(made))
    peaks = np.array([memory.peak_bytes(plan, unbounded) for plan in plans])
    rises = np.array([policy.delta_nll(plan, shape[1]) for plan in plans])
    for budget in np.linspace(peaks.min(), peaks.max() + 1, 25).astype(int):
        plan = policy.choose(Request(*shape, int(budget)))
        assert memory.peak_bytes(plan, unbounded) <= budget
        # A lowered level costs at least 1e-7, so that ties prefer less lowering.
        best = rises[peaks <= budget].min()
        assert policy.delta_nll(plan, shape[1]) == pytest.approx(best, abs=2e-6)
    smallest = policy.choose(Request(*shape, 1))
    assert memory.peak_bytes(smallest, unbounded) == peaks.min()
    assert policy.choose(Request(*shape, int(peaks.max()))) == Plan()


def test_ties_prefer_less_lowering():
    made = facts(packed=True)
    known = costs(made)
    free = {item: dict.fromkeys(levels, 0.0) for item, levels in known.costs.items()}
    policy = KnapsackPolicy(MemoryModel(made), replace(known, costs=free))
    native = policy.memory.native_peak_bytes(1, 700)
    assert policy.choose(Request(1, 700, native)) == Plan()
    assert len(policy.choose(Request(1, 700, native - 1)).levels) == 1


def test_a_window_longer_than_the_sequences_is_not_chosen():
    """It needs as many bytes as the level without it, whatever was measured for it."""
    made = facts(layers=16, packed=True)  # enough caches to pay for their workspace
    known = costs(made, caches=("int4", "int4-window1024"), window_tokens=2048)
    for item, levels in known.costs.items():
        if item.endswith(".cache"):
            levels |= {"int4": 0.2, "int4-window1024": 0.1}
    policy = KnapsackPolicy(MemoryModel(made), known)
    budgets = (0.9, 0.8, 0.7, 0.6)
    for length, windows in ((1000, False), (3000, True)):
        requests = [Request.at_fraction(policy.memory, 4, length, f) for f in budgets]
        found = {level for r in requests for level in policy.choose(r).levels.values()}
        assert ("int4-window1024" in found) == windows, found
        assert found - {"removed"}


def test_only_measured_levels_are_chosen():
    made = facts()
    known = costs(made)
    some = {item: levels for item, levels in known.costs.items() if item.endswith(".ffn")}
    policy = KnapsackPolicy(MemoryModel(made), replace(known, costs=some))
    for fraction in (0.9, 0.7, 0.5):
        plan = policy.choose(Request.at_fraction(policy.memory, 1, 20, fraction))
        assert plan.levels
        assert all(item.endswith(".ffn") for item in plan.levels)


def test_the_removal_order_follows_the_costs():
    made = facts(packed=True)
    known = costs(made)
    policy = KnapsackPolicy(MemoryModel(made), known)
    rises = [known.cost(block_name(index), "removed") for index in policy.order]
    assert sorted(policy.order) == [0, 1, 2, 3]
    assert rises == sorted(rises)
    some = {item: levels for item, levels in known.costs.items() if item != "layer01.ffn"}
    assert KnapsackPolicy(MemoryModel(made), replace(known, costs=some)).order == ()


def test_costs_and_requests_of_another_model_are_rejected():
    with pytest.raises(ArtifactError, match="2 layers, but made has 3"):
        KnapsackPolicy(MemoryModel(facts(3)), costs(facts(2)))
    policy = KnapsackPolicy(MemoryModel(facts()), costs(facts()))
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        policy.choose(Request(1, 5000, 1000))


@pytest.mark.parametrize("seed", range(10))
def test_over_masks_it_has_the_least_sum_of_all_masks_that_fit(seed):
    rng = np.random.default_rng(seed)
    context = SyntheticContext(rng.normal(0.5, 0.5, 8))
    request = needing(context, int(rng.integers(1, 15000)))
    plan = make_method("knapsack", context).choose(request)
    sums = [context.scorer.loss(mask) for mask in every_mask(8) if fits(context, mask, request)]
    assert fits(context, plan, request)
    assert context.scorer.loss(plan) == pytest.approx(min(sums))


def drawn_sets(rng, style):
    """A small instance: any options, few distinct values with ties, or levels as models have."""
    sizes, costs = [], []
    for _ in range(rng.integers(1, 6)):
        count = rng.integers(1, 5)
        if style == "any":
            held, price = rng.integers(0, 50, count), rng.random(count)
        elif style == "ties":
            held, price = rng.choice([0, 5, 10, 20], count), rng.choice([0, 0.1, 0.2, 0.3], count)
        else:
            held = np.sort(rng.choice(40, count, replace=False))[::-1]
            price = np.sort(rng.random(count))
        sizes.append(held.tolist())
        costs.append(price.tolist())
    return sizes, costs


def totals(sizes, costs, chosen):
    rows = list(enumerate(chosen))
    return sum(sizes[i][k] for i, k in rows), sum(costs[i][k] for i, k in rows)


@pytest.mark.parametrize("style", ["any", "ties", "levels"])
def test_it_equals_brute_force(style):
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, costs = drawn_sets(rng, style)
        every = [
            totals(sizes, costs, chosen)
            for chosen in itertools.product(*(range(len(held)) for held in sizes))
        ]
        solver = MultipleChoice(sizes, costs)
        assert solver.least_bytes == min(held for held, _ in every)
        for budget in rng.integers(0, sum(map(max, sizes)) + 2, 4):
            best = min((cost for held, cost in every if held <= budget), default=None)
            found = solver.solve(int(budget))
            if best is None:
                assert found is None
                continue
            held, cost = totals(sizes, costs, found)
            assert held <= budget
            # Sums in another order differ in their last bits.
            assert cost == pytest.approx(best, abs=1e-9)
            assert cost == pytest.approx(solver.cost(found))
