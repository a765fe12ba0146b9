"""Costs of levels by gradient: one backward pass, and each block at each of its levels alone.

With δ the change of a block's output at a token if the block, or its cache, has a level, and
g the gradient of the summed NLL there, ``½ Σ (g·δ)² / N`` estimates the rise in NLL, nats per
token, over N predicted tokens. It is the second-order term of the NLL with the Fisher matrix
in place of the Hessian, as in Fisher pruning (Theis et al. 2018, arXiv 1801.05787). The
first-order term is left out: it is the noise of a text.

The estimate is too low where a change is large. So for removals it is what it estimates, the
divergence from the native model's predictions, measured on some tokens; and the costs of few
bits, windows and removals are scaled to what some plans lose that have them in many items at
once (`joint_plans`). What embeddings lose is measured.

Windows of text run one at a time, and some entries of the vocabulary at a time, so that one
layer's weights and one window's states are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any, cast

import torch

from rap_env.importance.level_costs import (
    CACHE_LEVELS,
    Costs,
    LevelCosts,
    ordered_costs,
    window_share,
)
from rap_env.levels import CacheLevel
from rap_env.memory import ModelFacts
from rap_env.models.files.loading import load_again
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import LeanLlama
from rap_env.models.live.partial_forward import PartialForward, head_divergences, head_nll
from rap_env.models.progress import progress_bar
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.models.weights.packing import PACKED_LEVELS
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name, is_cache
from rap_env.scoring.corpus import Corpus

REMOVAL_TOKENS, _REMOVAL_STEP = 128, 4
"""The removal of each block is measured on every fourth of so many tokens of a window.

The divergence from the native predictions needs fewer tokens than the rise in NLL: it depends
on all probabilities, not on those of the tokens that the text happens to have.
"""

_STATES_AT_ONCE = 8  # states that run through a layer together

_FACTOR_RANGE = 0.1, 10.0
_REGIONS = 4  # parts of the layers, each with a scale of removals of its own

Scaled = tuple[tuple[str, ...], str]
"""Names of items, and the level whose costs are scaled together."""


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
        removed: What the removal of each block costs, by its name, nats per token.
    """

    nll: float
    sums: Costs
    removed: dict[str, float]


def window_costs(
    forward: PartialForward, window: torch.Tensor, levels: Mapping[str, Sequence[str]]
) -> WindowCosts:
    """Run a window through the native model, back again, and through each level of each block.

    Args:
        forward: Steps of a float32 model that pass gradients.
        window: Token ids, (1, T).
        levels: The levels of each item, by name; those of the embeddings are left out.
    """
    made = {item: [n for n in names if n != "removed"] for item, names in levels.items()}
    nll, changes = token_changes(forward, window, made)
    sums = {
        item: {level: 0.5 * float(change.square().sum()) for level, change in of_levels.items()}
        for item, of_levels in changes.items()
    }
    blocks = [name for name, offered in levels.items() if "removed" in offered]
    removed = _removals(forward, window[:, :REMOVAL_TOKENS], blocks) if blocks else {}
    return WindowCosts(float(nll.double().sum()), sums, removed)


def token_changes(
    forward: PartialForward, window: torch.Tensor, levels: Mapping[str, Sequence[str]]
) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    """NLL of a window's tokens, (T - 1,), and ``g·δ`` at each, (T,), by names of items and levels.

    Args:
        forward: As for `window_costs`.
        window: Token ids, (1, T).
        levels: The levels of each item, by name; those of the embeddings are left out.
    """
    states = [forward.enter(window).detach()]
    for layer in forward.layer_steps:
        state = states[-1]
        with forward.loaded(layer):
            for step in layer:
                state = forward.run(step, state).detach()
        states.append(state)
    nll, gradient = _final_gradient(forward, states.pop(), window)
    changes: dict[str, dict[str, torch.Tensor]] = {}
    for layer in reversed(forward.layer_steps):
        with forward.loaded(layer):
            gradient = _layer_changes(forward, layer, states.pop(), gradient, levels, changes)
    return nll, changes


def _removals(
    forward: PartialForward, ids: torch.Tensor, blocks: Sequence[str]
) -> dict[str, float]:
    """What removing each block costs on some token ids, (1, T), nats per token."""
    state, without = forward.enter(ids).detach(), dict[str, torch.Tensor]()
    for layer in forward.layer_steps:
        with forward.loaded(layer):
            for step in layer:
                without = _through(forward, step, without)
                for index in step:
                    if block_name(index) in blocks:
                        left = forward.run(step, state, Plan.removing(index))
                        without[block_name(index)] = left.detach()
                state = forward.run(step, state).detach()
    start = (ids.shape[1] - 1) % _REMOVAL_STEP  # so that the last token is among them

    def decoded(state: torch.Tensor) -> torch.Tensor:
        return forward.leave(state).detach()[0, start::_REMOVAL_STEP]

    costs = head_divergences(forward, decoded(state), list(map(decoded, without.values())))
    return dict(zip(without, costs, strict=True))


def _through(
    forward: PartialForward, step: tuple[int, ...], states: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """States by name, (1, T, H) each, after a step, which runs for some of them at a time."""
    inputs, outputs = list(states.values()), list[torch.Tensor]()
    for first in range(0, len(inputs), _STATES_AT_ONCE):
        some = torch.cat(inputs[first : first + _STATES_AT_ONCE])
        outputs += torch.split(forward.run(step, some).detach(), 1)
    return dict(zip(states, outputs, strict=True))


def _layer_changes(
    forward: PartialForward,
    layer: Sequence[tuple[int, ...]],
    state: torch.Tensor,
    gradient: torch.Tensor,
    levels: Mapping[str, Sequence[str]],
    changes: dict[str, dict[str, torch.Tensor]],
) -> torch.Tensor:
    """Add the changes of a layer, and return the gradient at its input, (1, T, H).

    Args:
        forward: Runs the steps.
        layer: The steps of the layer.
        state: Its input, (1, T, H).
        gradient: The gradient at its output, (1, T, H).
        levels: As for `token_changes`.
        changes: Is added to.
    """
    states = [state.requires_grad_()]
    for step in layer:
        states.append(forward.run(step, states[-1]))
    gradients = [*torch.autograd.grad(states[-1], states[:-1], gradient), gradient]
    states = [entered.detach() for entered in states]
    forward.release()  # a level's widened weights take as much again
    for number, step in enumerate(layer):
        entered, output, slope = states[number], states[number + 1], gradients[number + 1]
        names = [block_name(index) for index in step]
        names += [cache_name(index // 2) for index in step if index % 2 == 0]
        for name in names:
            changes[name] = {}
            for level in levels.get(name, ()):
                change = forward.run(step, entered, Plan.of({name: level})).detach() - output
                changes[name][level] = (slope * change).sum(-1).double()[0]
                if not is_cache(name):  # native weights serve all levels of a cache
                    forward.release()
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
    """Costs of the levels of blocks and caches before any scaling, nats per token."""
    tokens = len(windows) * (window_tokens - 1)
    costs: Costs = {}
    for item, levels in windows[0].sums.items():
        costs[item] = {n: sum(w.sums[item][n] for w in windows) / tokens for n in levels}
        if item in windows[0].removed:
            costs[item]["removed"] = sum(w.removed[item] for w in windows) / len(windows)
    return ordered_costs(costs)


def joint_plans(
    costs: Costs, levels: Mapping[str, Sequence[str]], most_bits: int = 3
) -> dict[Scaled, Plan]:
    """Plans to measure, by the items and the level whose costs they scale.

    They are each level of the embeddings; levels of few bits of all blocks; the shortest
    window of all caches; and for each quarter of the layers, the removal of the quarter of its
    blocks that lose least: together they lose more than the sum of what each loses alone, in
    some parts of a model and in long texts more than in others.

    Args:
        costs: As of `mean_costs`.
        levels: The levels of each item, as of `item_levels`.
        most_bits: Most bits of the levels that all blocks have.
    """
    plans: dict[Scaled, Plan] = {}
    for name in levels[EMBEDDINGS]:
        plans[(EMBEDDINGS,), name] = Plan.of({EMBEDDINGS: name})
    blocks = [item for item in costs if not is_cache(item)]
    caches = tuple(item for item in costs if is_cache(item))
    for name, form in LOW_BIT_FORMATS.items():
        if lowered := tuple(i for i in blocks if name in costs[i] and form.bits <= most_bits):
            plans[lowered, name] = Plan.of(dict.fromkeys(lowered, name))
    levels_of_caches = [CacheLevel.of(name) for item in caches[:1] for name in costs[item]]
    if windows := [level for level in levels_of_caches if level.window_tokens]:
        shortest = min(windows, key=lambda level: (level.window_tokens or 0, level.bits)).name
        plans[caches, shortest] = Plan.of(dict.fromkeys(caches, shortest))
    edges = [len(blocks) * number // _REGIONS for number in range(_REGIONS + 1)]
    for first, end in pairwise(edges):
        region = tuple(item for item in blocks[first:end] if "removed" in costs[item])
        few = sorted(region, key=lambda item: costs[item]["removed"])[: len(region) // 4]
        if few:
            plans[region, "removed"] = Plan.of(dict.fromkeys(few, "removed"))
    return plans


def scaled_costs(costs: Costs, measured: Mapping[Scaled, tuple[Plan, float]]) -> Costs:
    """Costs that add up to what the joint plans lose.

    Args:
        costs: As of `mean_costs`.
        measured: The plans of `joint_plans` with their rise in NLL, nats per token.
    """
    scaled = {item: dict(levels) for item, levels in costs.items()}
    scaled[EMBEDDINGS] = {}
    for (items, name), (plan, rise) in measured.items():
        if items == (EMBEDDINGS,):
            scaled[EMBEDDINGS][name] = max(rise, 0.0)
            continue
        total = sum(costs[item][level] for item, level in plan.levels.items())
        factor = min(max(rise / total, _FACTOR_RANGE[0]), _FACTOR_RANGE[1]) if total else 1.0
        for item in items:
            levels = costs[item]
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

    def run(group: str, count: int, do: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        return [do(number) for number in progress_bar(progress, range(count), desc=group)]

    parts = all_window_costs(forward, windows, levels, run)
    measure = partial(all_plan_nlls, forward, windows, run=run)
    fitted = fitted_costs(llm.facts, parts, levels, text, measure)
    return replace(fitted, seconds=time.monotonic() - started)


def native_changes(
    llm: ElasticLLM, windows: torch.Tensor, levels: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, torch.Tensor]]:
    """`token_changes` of a live model in this process, for windows of text, (windows, T)."""
    forward = PartialForward(_in_float32(llm, levels), widen=True, gradients=True)
    parts = [token_changes(forward, window[None], levels)[1] for window in windows]
    return {
        item: {level: torch.stack([part[item][level] for part in parts]) for level in of_levels}
        for item, of_levels in parts[0].items()
    }


RunTasks = Callable[[str, int, Callable[[int], dict[str, Any]]], list[dict[str, Any]]]
"""Does the tasks of a group, numbered from 0; takes its name, their number and what does one."""


def all_window_costs(
    forward: PartialForward,
    windows: torch.Tensor,
    levels: Mapping[str, Sequence[str]],
    run: RunTasks,
) -> list[WindowCosts]:
    """`window_costs` of each window, (windows, T), which is a task."""

    def do(number: int) -> dict[str, Any]:
        return asdict(window_costs(forward, windows[number, None], levels))

    return [WindowCosts(**result) for result in run("costs", len(windows), do)]


def all_plan_nlls(
    forward: PartialForward,
    windows: torch.Tensor,
    plans: Sequence[Plan],
    run: RunTasks,
    chats: torch.Tensor | None = None,
) -> list[list[float | None]]:
    """`plan_nlls` of each plan, which is a task, on windows and chats.

    Where there are chats, (chats, T), plans with windows of caches run on these alone, and other
    lowered plans on the windows alone; None is an NLL that was not measured.
    """
    texts = [windows] if chats is None else [windows, chats]

    def do(number: int) -> dict[str, Any]:
        plan = plans[number]
        left_out = None
        if chats is not None and plan:
            shortens = any(level.window_tokens for _, level in plan.caches)
            left_out = windows if shortens else chats
        nlls: list[float | None] = []
        for text in texts:
            nlls += [None] * len(text) if text is left_out else plan_nlls(forward, text, plan)
        return {"nlls": nlls}

    return [result["nlls"] for result in run("plans", len(plans), do)]


def _in_float32(llm: ElasticLLM, levels: Mapping[str, Sequence[str]]) -> ElasticLLM:
    """A model in float32 with the levels of another one, which are made if they are used."""
    used = [name for name in PACKED_LEVELS if any(name in names for names in levels.values())]
    if llm.absent_levels(used) and llm.calibrator is not None:
        llm.calibrator(llm)
    steps = not isinstance(llm.model, LeanLlama)  # whether it runs them
    if llm.folder is None or (steps and llm.dtype == torch.float32):
        return llm
    return load_again(llm.folder, str(llm.device), "float32", llm.level_files)


def fitted_costs(
    facts: ModelFacts,
    parts: Sequence[WindowCosts],
    levels: Mapping[str, Sequence[str]],
    text: Corpus,
    measure: Callable[[Sequence[Plan]], Sequence[Sequence[float | None]]],
    kinds: Sequence[str] = (),
    most_bits: int = 3,
) -> LevelCosts:
    """The costs that follow from the gradients on a text and the `joint_plans`, measured here.

    With several kinds of text, costs are those of the kind on which a joint plan loses most: a
    floor of quality holds for each kind then.

    Args:
        facts: Facts about the model.
        parts: What each window of the text tells.
        levels: The levels of each item, as of `item_levels`.
        text: The text.
        measure: Gives the NLL of plans on each window that plans are measured on, nats per
            token; those of the text are first. The first plan is the native one, and has all.
        kinds: The kind of text of each of these windows; empty for one kind.
        most_bits: As for `joint_plans`.
    """
    window_tokens = text.tokens.shape[1]
    costs = mean_costs(parts, window_tokens)
    plans = joint_plans(costs, levels, most_bits)
    first, *lowered = measure([Plan(), *plans.values()])
    native = [nll for nll in first if nll is not None]
    pairs = zip(plans.items(), lowered, strict=True)
    measured = {scaled: (plan, _worst_rise(native, nlls, kinds)) for (scaled, plan), nlls in pairs}
    evaluations = 1 + len(plans)
    return LevelCosts(
        num_layers=facts.num_layers,
        window_tokens=window_tokens,
        native_nll=fmean(native[: len(text.tokens)]),
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


def _worst_rise(
    native: Sequence[float], lowered: Sequence[float | None], kinds: Sequence[str]
) -> float:
    """The greatest mean rise in NLL of a kind of text, nats per token."""
    by_kind: dict[str, list[float]] = {}
    for number, (before, after) in enumerate(zip(native, lowered, strict=True)):
        if after is not None:
            by_kind.setdefault(kinds[number] if kinds else "", []).append(after - before)
    return max(map(fmean, by_kind.values()))


def plan_nlls(forward: PartialForward, windows: torch.Tensor, plan: Plan) -> list[float]:
    """Measured NLL of a plan on each window, nats per token; one layer is in memory at a time.

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
    with forward.embeddings(plan.embeddings):
        return [
            float(head_nll(forward, forward.leave(s).detach()[0, :-1], w[1:])[0].double().mean())
            for s, w in zip(states, windows, strict=True)
        ]
