"""Costs of levels by gradient, against gradients of the whole model."""

from statistics import fmean

import pytest
import torch
from torch.nn import functional

from rap_env.importance.gradient_costs import (
    item_levels,
    joint_plans,
    plan_nlls,
    scaled_costs,
    window_costs,
)
from rap_env.models.live.partial_forward import PartialForward, head_nll
from rap_env.plan import Plan, block_name, cache_name, is_cache
from tests.tiny import VOCAB_SIZE, each_family, tiny_llm

TOKENS = torch.arange(40)[None] * 7 % VOCAB_SIZE


def whole_model_gradients(llm):
    """The gradient of the summed NLL at the output of each layer, from transformers' own loss."""
    outputs = []

    def keep(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.requires_grad_().retain_grad()
        outputs.append(hidden)

    hooks = [layer.register_forward_hook(keep) for layer in llm.adapter.layers(llm.model)]
    with torch.enable_grad():
        logits = llm.model(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        nll = functional.cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum")
        nll.backward()
    for hook in hooks:
        hook.remove()
    return float(nll), [hidden.grad for hidden in outputs]


@each_family("family")
def test_costs_are_those_of_gradients_of_the_whole_model(family):
    llm = tiny_llm(family)
    levels = item_levels(llm.facts, ("int4", "int2"), TOKENS.shape[1])
    costs = window_costs(PartialForward(llm, widen=True, gradients=True), TOKENS, levels)
    expected_nll, gradients = whole_model_gradients(llm)
    assert costs.nll == pytest.approx(expected_nll, rel=1e-5)
    plain = PartialForward(llm, widen=True)
    states = [plain.enter(TOKENS)]
    for step in plain.steps:
        states.append(plain.run(step, states[-1]))
    for layer, gradient in enumerate(gradients):
        last = plain.layer_steps[layer][-1]
        number = plain.steps.index(last)
        block = block_name(last[-1])
        for level in costs.sums[block]:
            lowered = plain.run(last, states[number], Plan.of({block: level}))
            change = (lowered - states[number + 1]).double()
            expected = 0.5 * float((change * gradient.double()).sum(-1).square().sum())
            assert costs.sums[block][level] == pytest.approx(expected, rel=1e-3, abs=1e-12), level


@each_family("family")
def test_costs_of_bfloat16_products_are_near_those_of_float32(family):
    llm = tiny_llm(family)
    levels = item_levels(llm.facts, ("int4", "int2"), TOKENS.shape[1])
    exact, short = (
        window_costs(PartialForward(llm, widen=True, gradients=True, short=short), TOKENS, levels)
        for short in (False, True)
    )
    assert short.nll == pytest.approx(exact.nll, rel=5e-3)
    assert short.nll != exact.nll
    for item, sums in exact.sums.items():
        if not is_cache(item):
            assert short.sums[item]["int4"] == pytest.approx(sums["int4"], rel=0.2), item


@each_family("family")
def test_the_gradient_passes_through_feed_forward_blocks(family):
    """The costs of attention are those of gradients through all that runs behind it."""
    llm = tiny_llm(family)
    forward = PartialForward(llm, widen=True, gradients=True)
    levels = item_levels(llm.facts, ("int2",), TOKENS.shape[1])
    sums = window_costs(forward, TOKENS, levels).sums
    state = forward.enter(TOKENS).detach()
    output = forward.run(forward.steps[0], state).detach().requires_grad_()
    hidden = output
    for step in forward.steps[1:]:
        hidden = forward.run(step, hidden)
    logits = forward.logits(forward.leave(hidden)[0, :-1]).float()
    functional.cross_entropy(logits, TOKENS[0, 1:], reduction="sum").backward()
    for name in (block_name(0), cache_name(0)):
        for level in sums[name]:
            change = forward.run(forward.steps[0], state, Plan.of({name: level})) - output
            expected = 0.5 * float((change * output.grad).sum(-1).double().square().sum())
            assert sums[name][level] == pytest.approx(expected, rel=1e-3, abs=1e-12), level


@each_family("family")
def test_the_measured_nll_is_that_of_the_model_under_the_plan(family):
    llm = tiny_llm(family)
    plan = Plan.of({block_name(1): "int8", block_name(2): "removed"})
    forward = PartialForward(llm, widen=True)
    with llm.applied(plan), torch.no_grad():
        logits = llm.model(TOKENS, use_cache=False).logits[0, :-1].float()
    expected = float(functional.cross_entropy(logits, TOKENS[0, 1:]))
    assert fmean(plan_nlls(forward, TOKENS, plan)) == pytest.approx(expected, rel=1e-4)


@each_family("family")
def test_removals_cost_their_divergence_from_the_native_predictions(family, monkeypatch):
    monkeypatch.setattr("rap_env.importance.gradient_costs.REMOVAL_TOKENS", 10)
    monkeypatch.setattr("rap_env.models.live.partial_forward._HEAD_VALUES", 1)
    llm = tiny_llm(family)
    levels = item_levels(llm.facts, (), TOKENS.shape[1])
    costs = window_costs(PartialForward(llm, widen=True, gradients=True), TOKENS, levels)

    def log_shares(plan):
        with llm.applied(plan), torch.no_grad():
            logits = llm.model(TOKENS[:, :10], use_cache=False).logits[0]
        return logits[[1, 5, 9]].double().log_softmax(-1)

    native = log_shares(Plan())
    assert set(costs.removed) == {block_name(block) for block in range(llm.num_blocks)}
    for block in range(llm.num_blocks):
        left = log_shares(Plan.removing(block))
        expected = float(functional.kl_div(left, native, reduction="sum", log_target=True)) / 3
        assert costs.removed[block_name(block)] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
def test_the_head_in_parts_has_the_nll_and_gradient_of_the_whole(family, monkeypatch):
    monkeypatch.setattr("rap_env.models.live.partial_forward._HEAD_VALUES", 1)
    llm = tiny_llm(family)
    forward = PartialForward(llm, widen=True, gradients=True)
    hidden = torch.randn(9, llm.adapter.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(9) * 6 % VOCAB_SIZE
    nll, gradient = head_nll(forward, hidden, targets, gradient=True)
    leaf = hidden.clone().requires_grad_()
    expected = functional.cross_entropy(forward.logits(leaf).float(), targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


def test_the_joint_plans_do_not_depend_on_the_order_of_levels():
    caches = {cache_name(n): {"int4-window128": 3.0, "int4-window512": 1.0} for n in range(2)}
    blocks = {block_name(n): {"int2": 2.0, "int3": 1.0, "removed": n + 9.0} for n in range(16)}
    levels = {"embeddings": ["int3", "int8"]}
    plans = joint_plans({**blocks, **caches}, levels)
    embeddings, names = ("embeddings",), tuple(blocks)
    regions = [names[first : first + 4] for first in (0, 4, 8, 12)]
    assert set(plans) == {
        (embeddings, "int3"), (embeddings, "int8"), (names, "int3"), (names, "int2"),
        (tuple(caches), "int4-window128"), *((region, "removed") for region in regions),
    }  # fmt: skip
    assert [plans[region, "removed"] for region in regions] == [
        Plan.removing(block) for block in (0, 4, 8, 12)
    ]


def test_a_level_of_four_bits_is_measured_where_it_is_asked_for():
    blocks = {block_name(n): {"int4-compact": 0.1, "int3": 1.0} for n in range(4)}
    few, more = (joint_plans(blocks, {"embeddings": []}, bits) for bits in (3, 4))
    added = (tuple(blocks), "int4-compact")
    assert more == {**few, added: Plan.of(dict.fromkeys(blocks, "int4-compact"))}


def test_costs_are_scaled_to_what_the_joint_plans_lose():
    costs = {
        block_name(0): {"int8": 0.1, "int3": 1.0, "removed": 2.0},
        block_name(1): {"int3": 3.0, "removed": 3.5},
        cache_name(0): {"int4": 0.5, "int4-window128": 1.0},
    }
    uniform = Plan.of({block_name(0): "int3", block_name(1): "int3"})
    window = Plan.of({cache_name(0): "int4-window128"})
    rises = {
        ((block_name(0), block_name(1)), "int3"): (uniform, 2.0),
        ((block_name(1),), "removed"): (Plan.removing(1), 7.0),
        ((cache_name(0),), "int4-window128"): (window, 0.25),
        (("embeddings",), "int8"): (Plan(embeddings="int8"), -0.1),
    }
    scaled = scaled_costs(costs, rises)
    assert scaled[block_name(0)] == {"int8": 0.1, "int3": 0.5, "removed": 2.0}
    assert scaled[block_name(1)] == {"int3": 1.5, "removed": 7.0}
    # A window never costs less than the same bits without it.
    assert scaled[cache_name(0)] == {"int4": 0.5, "int4-window128": 0.5}
    assert scaled["embeddings"] == {"int8": 0.0}
