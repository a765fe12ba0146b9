"""Costs of levels by gradient: one backward pass, and each block at each of its levels alone.

With δ the change of a block's output at a token if the block, or its cache, has a level, and
g the gradient of the summed NLL there, ``½ Σ (g·δ)² / N`` estimates the rise in NLL, nats per
token, over N predicted tokens. It is the second-order term of the NLL with the Fisher matrix
in place of the Hessian, as in Fisher pruning (Theis et al. 2018, arXiv 1801.05787). The
first-order term is left out: it is the noise of a text.

The estimate is too low where a change is large. So the removal of each block is also measured
on a few tokens, and the costs of few bits, windows and removals are scaled to
what some plans lose that have them in many items at once (`joint_plans`). What embeddings
lose is measured.

Windows of text run one at a time, and some entries of the vocabulary at a time, so that one
layer's weights and one window's states are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from rap_env.importance.level_costs import (
    CACHE_LEVELS,
    Costs,
    LevelCosts,
    ordered_costs,
    window_share,
)
from rap_env.levels import CacheLevel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.models.weights.packed_layout import BLOCK, LOW_BIT_FORMATS, PACKED_LEVELS
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name, is_cache
from rap_env.scoring.corpus import Corpus

REMOVAL_TOKENS, REMOVAL_EVERY = 64, 2
"""Tokens at the start of every second window on which the removal of each block is measured.

On two windows of the default model they found every block whose removal loses much more than
its gradient tells, such as the FFN of layer 0 (10.5 nats, 0.6 by gradient).
"""

_FACTOR_RANGE = 0.1, 10.0
_REMOVED_SHARE = 8  # one of so many blocks is removed in the joint plan of removals

_HEAD_VALUES = 2**23
"""Entries of the head's weights that are in memory at a time, in float32."""


def item_levels(
    facts: ModelFacts, cache_levels: Sequence[str], window_tokens: int
) -> dict[str, list[str]]:
    """The levels of each item below the native one, by names of items and levels.

    Args:
        facts: Facts about the model.
        cache_levels: Levels of caches; windows that hold a whole window of text are left out.
        window_tokens: Tokens of a window of text.
    """
    levels: dict[str, list[str]] = {}
    for index in range(facts.num_blocks):
        levels[block_name(index)] = [n for n in facts.weight_levels(index) if n != "native"]
    if facts.kv_heads:
        known = map(CacheLevel.of, cache_levels)
        useful = [c.name for c in known if not c.window_tokens or window_share(c, window_tokens)]
        levels |= {cache_name(layer): useful for layer in range(facts.num_layers)}
    return levels | {EMBEDDINGS: [n for n in facts.embedding_levels if n != "native"]}


@dataclass(frozen=True)
class WindowCosts:
    """What one window tells, summed over its predicted tokens.

    Attributes:
        nll: NLL of the native model.
        sums: ``½ Σ (g·δ)²`` of each level of each block and cache.
        removed: Rise in NLL over the first `REMOVAL_TOKENS` tokens without each block, by
            name; empty where that was not measured.
    """

    nll: float
    sums: Costs
    removed: dict[str, float]


def window_costs(
    forward: PartialForward,
    window: torch.Tensor,
    levels: Mapping[str, Sequence[str]],
    *,
    removals: bool = True,
) -> WindowCosts:
    """Run a window through the native model, back again, and through each level of each block.

    Args:
        forward: Steps of a float32 model that pass gradients.
        window: Token ids, (1, T).
        levels: The levels of each item, by name; those of the embeddings are left out.
        removals: Whether removals are measured too.
    """
    state = forward.enter(window).detach()
    states, without = [state], dict[str, torch.Tensor]()
    for layer in forward.layer_steps:
        with forward.loaded(layer):
            for step in layer:
                without = {n: forward.run(step, s).detach() for n, s in without.items()}
                first = state[:, : REMOVAL_TOKENS + 1]
                for index in step:
                    if removals and "removed" in levels[block_name(index)]:
                        left = forward.run(step, first, Plan.removing(index))
                        without[block_name(index)] = left.detach()
                state = forward.run(step, state).detach()
        states.append(state)
    nll, gradient = _final_gradient(forward, states.pop(), window)
    ends = {name: forward.leave(end).detach() for name, end in without.items()}
    ids = window[0, 1 : REMOVAL_TOKENS + 1]
    rises = {n: head_nll(forward, end[0, : len(ids)], ids)[0] for n, end in ends.items()}
    native = nll[: len(ids)].sum()
    sums: Costs = {}
    for layer in reversed(forward.layer_steps):
        with forward.loaded(layer):
            gradient = _layer_costs(forward, layer, states.pop(), gradient, levels, sums)
        forward.forget(layer)
    removed = {name: float(rise.sum() - native) for name, rise in rises.items()}
    return WindowCosts(float(nll.double().sum()), sums, removed)


def numbered_costs(
    forward: PartialForward, windows: torch.Tensor, number: int, levels: Mapping[str, Sequence[str]]
) -> WindowCosts:
    """The `window_costs` of one window of a text, (windows, T), with removals for some of them."""
    removals = number % REMOVAL_EVERY == 0
    return window_costs(forward, windows[number, None], levels, removals=removals)


def _layer_costs(
    forward: PartialForward,
    layer: Sequence[tuple[int, ...]],
    state: torch.Tensor,
    gradient: torch.Tensor,
    levels: Mapping[str, Sequence[str]],
    sums: Costs,
) -> torch.Tensor:
    """Add the sums of a layer, and return the gradient at its input, (1, T, H).

    Args:
        forward: Runs the steps.
        layer: The steps of the layer.
        state: Its input, (1, T, H).
        gradient: The gradient at its output, (1, T, H).
        levels: As for `window_costs`.
        sums: Is added to, by names of items and levels.
    """
    states = [state.requires_grad_()]
    for step in layer:
        states.append(forward.run(step, states[-1]))
    gradients = [*torch.autograd.grad(states[-1], states[:-1], gradient), gradient]
    states = [entered.detach() for entered in states]
    for number, step in enumerate(layer):
        entered, output, slope = states[number], states[number + 1], gradients[number + 1]
        names = [block_name(index) for index in step]
        names += [cache_name(index // 2) for index in step if index % 2 == 0]
        for name in names:
            sums[name] = {}
            for level in levels.get(name, ()):
                change = forward.run(step, entered, Plan.of({name: level})).detach() - output
                sums[name][level] = 0.5 * float((slope * change).sum(-1).double().square().sum())
    return gradients[0]


def _final_gradient(
    forward: PartialForward, state: torch.Tensor, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of a window's tokens, (T - 1,), and the gradient of their sum at the last layer's output.

    The gradient is (1, T, H).
    """
    state.requires_grad_()
    hidden = forward.leave(state)
    nll, gradient = head_nll(forward, hidden.detach()[0, :-1], window[0, 1:], gradient=True)
    last = torch.zeros_like(hidden)
    last[0, :-1] = cast(torch.Tensor, gradient).to(last.dtype)
    return nll, torch.autograd.grad(hidden, state, last)[0]


def mean_costs(windows: Sequence[WindowCosts], window_tokens: int) -> Costs:
    """Costs by gradient, nats per token; of removals what is larger: that, or what was measured."""
    tokens = len(windows) * (window_tokens - 1)
    removals = [window.removed for window in windows if window.removed]
    first = len(removals) * min(REMOVAL_TOKENS, window_tokens - 1)
    costs: Costs = {}
    for item, levels in windows[0].sums.items():
        costs[item] = {n: sum(w.sums[item][n] for w in windows) / tokens for n in levels}
        if "removed" in levels and removals:
            measured = sum(rises[item] for rises in removals) / first
            costs[item]["removed"] = max(costs[item]["removed"], measured)
    return ordered_costs(costs)


def joint_plans(costs: Costs, levels: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Plan]:
    """Plans to measure, by the kind of items and the level whose costs they scale.

    They are each level of the embeddings, levels below four bits of all blocks, the shortest
    window of all caches, and the removal of the blocks that lose least.
    """
    plans = {(EMBEDDINGS, name): Plan.of({EMBEDDINGS: name}) for name in levels[EMBEDDINGS]}
    blocks = [item for item in costs if not is_cache(item)]
    caches = [item for item in costs if is_cache(item)]
    for name, form in LOW_BIT_FORMATS.items():
        if lowered := [item for item in blocks if name in costs[item] and form.bits < 4]:
            plans["block", name] = Plan.of(dict.fromkeys(lowered, name))
    levels_of_caches = [CacheLevel.of(name) for item in caches[:1] for name in costs[item]]
    if windows := [level for level in levels_of_caches if level.window_tokens]:
        shortest = min(windows, key=lambda level: (level.window_tokens or 0, level.bits)).name
        plans["cache", shortest] = Plan.of(dict.fromkeys(caches, shortest))
    removable = sorted(
        (item for item in blocks if "removed" in costs[item]), key=lambda i: costs[i]["removed"]
    )
    if few := removable[: len(removable) // _REMOVED_SHARE]:
        plans["block", "removed"] = Plan.of(dict.fromkeys(few, "removed"))
    return plans


def scaled_costs(costs: Costs, measured: Mapping[tuple[str, str], tuple[Plan, float]]) -> Costs:
    """Costs that add up to what the joint plans lose.

    Args:
        costs: As of `mean_costs`.
        measured: The plans of `joint_plans` with their rise in NLL, nats per token.
    """
    scaled = {item: dict(levels) for item, levels in costs.items()}
    scaled[EMBEDDINGS] = {}
    for (kind, name), (plan, rise) in measured.items():
        if kind == EMBEDDINGS:
            scaled[EMBEDDINGS][name] = max(rise, 0.0)
            continue
        total = sum(costs[item][level] for item, level in plan.levels.items())
        factor = min(max(rise / total, _FACTOR_RANGE[0]), _FACTOR_RANGE[1]) if total else 1.0
        for item, levels in costs.items():
            if is_cache(item) == (kind == "cache"):
                alike = [n for n in levels if n == name or (is_cache(item) and "window" in n)]
                scaled[item] |= {level: factor * levels[level] for level in alike}
    return ordered_costs(scaled)


def gradient_costs(
    llm: ElasticLLM,
    text: Corpus,
    levels: Mapping[str, Sequence[str]] | None = None,
    *,
    progress: bool = True,
) -> LevelCosts:
    """Costs of the levels of a live model on a text, in this process.

    They are computed in float32. For a model of another dtype its files are read again, a
    layer at a time; without files it is done in its own dtype, in which small changes are
    rounded.

    Args:
        llm: The model.
        text: The text; windows of caches cost nothing on windows of text that they hold.
        levels: The levels of each item, as of `item_levels`; None for all weights and
            `CACHE_LEVELS`.
        progress: Whether to show a progress bar.
    """
    started, windows = time.monotonic(), text.tokens.to(llm.device)
    levels = levels or item_levels(llm.facts, CACHE_LEVELS, windows.shape[1])
    forward = PartialForward(_in_float32(llm, levels), widen=True, gradients=True)
    with progress_bar(progress, total=len(windows), desc="costs", unit="window") as bar:
        parts = []
        for number in range(len(windows)):
            parts.append(numbered_costs(forward, windows, number, levels))
            bar.update()
    costs = mean_costs(parts, windows.shape[1])
    plans = joint_plans(costs, levels)
    nlls = [plan_nll(forward, windows, plan) for plan in (Plan(), *plans.values())]
    fitted = fitted_costs(llm.facts, costs, plans, nlls, text)
    return replace(fitted, seconds=time.monotonic() - started)


def _in_float32(llm: ElasticLLM, levels: Mapping[str, Sequence[str]]) -> ElasticLLM:
    """A model in float32 with the levels of another one, which are made if they are used."""
    used = [name for name in PACKED_LEVELS if any(name in names for names in levels.values())]
    if llm.absent_levels(used) and llm.calibrator is not None:
        llm.calibrator(llm)
    if llm.dtype == torch.float32 or llm.folder is None:
        return llm
    wide = load_llm(llm.folder, device=str(llm.device), dtype="float32", on_demand=True)
    for own, given in zip(wide._live.all_items, llm._live.all_items, strict=True):
        own.files.update(given.files)
    return wide


def fitted_costs(
    facts: ModelFacts,
    costs: Costs,
    plans: Mapping[tuple[str, str], Plan],
    nlls: Sequence[float],
    text: Corpus,
) -> LevelCosts:
    """The costs that follow from the gradients on a text and the measured joint plans.

    Args:
        facts: Facts about the model.
        costs: The `mean_costs` of the windows of the text.
        plans: The `joint_plans`.
        nlls: The NLL of the native model and of each of them, nats per token.
        text: The text.
    """
    native, *lowered = nlls
    rises = [nll - native for nll in lowered]
    measured = {pair: (plan, r) for (pair, plan), r in zip(plans.items(), rises, strict=True)}
    evaluations = len(nlls)
    return LevelCosts(
        num_layers=facts.num_layers,
        window_tokens=text.tokens.shape[1],
        native_nll=native,
        costs=scaled_costs(costs, measured),
        joint={plan.to_json(): rise for plan, rise in measured.values()},
        evaluations=evaluations,
        evaluations_run=evaluations,
        block_forwards=float(evaluations * facts.num_blocks),
        seconds=0.0,
        provenance={
            "model": facts.name,
            "fingerprint": facts.fingerprint,
            "text": text.provenance,
            "scoring": {"weights": facts.weights, "calibration": facts.calibration},
        },
    )


def plan_nll(forward: PartialForward, windows: torch.Tensor, plan: Plan) -> float:
    """Measured NLL of a plan, nats per token, of which one layer is in memory at a time.

    Args:
        forward: Steps of a float32 model.
        windows: Token ids, (windows, T).
        plan: The plan.
    """
    states = [forward.enter(window[None], plan.embeddings) for window in windows]
    for layer in forward.layer_steps:
        with forward.loaded(layer):
            for step in layer:
                states = [forward.run(step, state, plan).detach() for state in states]
        forward.forget(layer)
    with forward.embeddings(plan.embeddings):
        nlls = [
            head_nll(forward, forward.leave(state).detach()[0, :-1], window[1:])[0]
            for state, window in zip(states, windows, strict=True)
        ]
    return float(torch.cat(nlls).double().mean())


@torch.no_grad()
def head_nll(
    forward: PartialForward, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NLL of each target, (N,), and the gradient of their sum with respect to `hidden`, (N, H).

    The weights of the head are widened in parts, so that neither they nor all logits are in
    memory as a whole.

    Args:
        forward: Has the head.
        hidden: The decoder's output, (N, H).
        targets: The tokens to predict, (N,).
        gradient: Whether the gradient is computed.
    """
    hidden = hidden.float()
    total = hidden.new_full((len(hidden),), -torch.inf)
    target_logits, targets = torch.empty_like(total), targets.to(hidden.device)
    for first, weight, bias in _head_parts(forward):
        logits, _ = _capped(forward, hidden, weight, bias)
        total = torch.logaddexp(total, logits.logsumexp(-1))
        rows, columns = _within(targets, first, len(weight))
        target_logits[rows] = logits[rows, columns]
    nll = total - target_logits
    if not gradient:
        return nll, None
    slope = torch.zeros_like(hidden)
    for first, weight, bias in _head_parts(forward):
        logits, steepness = _capped(forward, hidden, weight, bias)
        errors = logits.sub_(total[:, None]).exp_()
        rows, columns = _within(targets, first, len(weight))
        errors[rows, columns] -= 1
        slope.addmm_(errors if steepness is None else errors.mul_(steepness), weight)
    return nll, slope


def _head_parts(
    forward: PartialForward,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Parts of the head's rows in float32: the first row, weights (rows, H), and biases (rows,)."""
    head: Any = forward.model.get_output_embeddings()
    matrix = head.matrices["weight"] if isinstance(head, PackedModule) else None
    shape = head.weight.shape if matrix is None else matrix.shape
    size = max(BLOCK, _HEAD_VALUES // shape[1] // BLOCK * BLOCK)
    for first in range(0, shape[0], size):
        part = slice(first, min(first + size, shape[0]))
        if matrix is None:
            weight = head.weight[part].to(forward.model.device).float()
        else:
            weight = torch.empty(part.stop - first, shape[1], device=matrix.device)
            matrix.widen(weight, first)
        yield first, weight, None if head.bias is None else head.bias[part].float()


def _capped(
    forward: PartialForward, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of a part of the vocabulary, (N, rows), and their slope under Gemma's soft cap."""
    logits = nn.functional.linear(hidden, weight, bias)
    with torch.enable_grad():
        inner = logits.detach().requires_grad_()
        capped = forward.adapter.cap_logits(inner)
        if capped is inner:
            return inner.detach(), None
        return capped.detach(), torch.autograd.grad(capped.sum(), inner)[0]


def _within(targets: torch.Tensor, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of targets in a part of the vocabulary, and their places there."""
    rows = ((targets >= first) & (targets < first + size)).nonzero()[:, 0]
    return rows, targets[rows] - first
