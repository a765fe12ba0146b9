"""Runs plans over a text and computes each block that several share only once.

They form a prefix tree over the steps of the model: two plans share all steps up to the first
block whose weights or cache differ in level. Plans that differ in the embeddings share
nothing.

`window_nll` computes the NLL from the last hidden states, a few rows of logits at a time.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch.nn import functional

from rap_env.levels import WeightLevel
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan

T = TypeVar("T")

Steps = tuple[tuple[int, ...], ...]
"""Blocks that run together, in order (`PartialForward.steps`)."""

Node = tuple[int, Plan]
"""A node of the prefix tree: the number of a step, and the plan of what runs before that
step."""

Visit = Callable[[Node, torch.Tensor], None]
"""Receives a node and the hidden state that enters it; must keep the state to use it
later."""

OnLogits = Callable[[torch.Tensor], object]
"""Called with the logits of some tokens, (rows, V), piece by piece in the order of the
text."""

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at a time on a CPU, in the model's dtype."""

_LOSS_ROWS = 16  # tokens whose float32 logits are in memory at a time: they fit the CPU cache
_LOSS_LOGITS = 2**17  # logits at a time of a small vocabulary
_GPU_LOGITS = 2**26  # logits that are in memory at a time on a GPU: few, large kernels


@lru_cache(maxsize=4096)
def plan_prefixes(plan: Plan, steps: Steps) -> tuple[Plan, ...]:
    """The part of a plan before each step; the last entry is the plan itself."""
    prefixes: list[Plan] = []
    for step in steps:
        prefix = plan.before(step[0])
        # Equal prefixes are one object, which makes comparing and hashing them cheap.
        prefixes.append(prefixes[-1] if prefixes and prefixes[-1] == prefix else prefix)
    return (*prefixes, plan)


@lru_cache(maxsize=4096)
def plan_steps(plan: Plan, steps: Steps) -> tuple[Plan, ...]:
    """The part of a plan that concerns the blocks of each step, without the embeddings."""
    return tuple(
        Plan(
            plan.removed.intersection(step),
            tuple(pair for pair in plan.weights if pair[0] in step),
            tuple(pair for pair in plan.caches if 2 * pair[0] in step),
        )
        for step in steps
    )


def sharing_order(plan: Plan, num_blocks: int) -> tuple[Any, ...]:
    """Sort key that puts plans next to those with which they share most of their first steps.

    At each block, plans that keep it natively come first and those that remove it last.
    """
    steps = []
    for index in range(num_blocks):
        weights = plan.weight_level(index)
        cache = "" if index % 2 else plan.cache_level(index // 2).name
        own = "" if weights in ("native", "removed") else weights
        steps.append((weights == "removed", own, "" if cache == "native" else cache))
    return ("" if plan.embeddings == "native" else plan.embeddings, *steps)


class StateCache:
    """Hidden states by batch of windows and node; evicts the least recently used state."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._states: OrderedDict[tuple[int, Node], torch.Tensor] = OrderedDict()

    def put(self, batch: int, node: Node, state: torch.Tensor) -> None:
        """Keep a state; without effect if it alone is larger than the cap.

        A state that is a part of a larger tensor, such as one of several that ran in one
        batch, is copied: as a view, it would keep all of that tensor in memory.
        """
        key = (batch, node)
        self._drop(key)
        if state.untyped_storage().nbytes() > state.nbytes:
            state = state.clone()
        self._states[key] = state
        self.held_bytes += state.nbytes
        while self.held_bytes > self.max_bytes:
            self._drop(next(iter(self._states)))

    def put_some(
        self, nodes: Collection[Node], batch: int, node: Node, state: torch.Tensor
    ) -> None:
        """Keep a state if its node is among some."""
        if node in nodes:
            self.put(batch, node, state)

    def get(self, batch: int, node: Node) -> torch.Tensor | None:
        """The state of a node, or None."""
        key = (batch, node)
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self.held_bytes = 0

    def _drop(self, key: tuple[int, Node]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.held_bytes -= state.nbytes


def branch_nodes(plans: Sequence[Plan], steps: Steps) -> set[Node]:
    """The nodes at which later plans of a list leave the path of earlier ones.

    Plans and steps are in the order in which they run.
    """
    paths = [plan_prefixes(plan, steps)[:-1] for plan in plans]
    leaves = [_last_shared(*two) for two in itertools.pairwise(paths)]
    nodes = set()
    for place, path in enumerate(paths[:-1]):
        nearest = len(steps)
        for leave in leaves[place:]:
            if leave < 0:
                break  # from there on nothing is shared
            if leave < nearest:
                nearest = leave
                node = (nearest, path[nearest])
                if node in nodes:
                    break  # an earlier plan keeps this node and all nodes before it
                nodes.add(node)
    return nodes


def _last_shared(one: Sequence[Plan], other: Sequence[Plan]) -> int:
    """The last step that two paths enter in the same state; -1 if their embeddings differ."""
    pairs = enumerate(zip(one, other, strict=True))
    return max((step for step, (a, b) in pairs if a == b), default=-1)


class PlanRunner:
    """Runs plans from the nearest cached states.

    The plans of one call advance together, one step at a time. A step runs once for all plans
    that agree on everything before it; plans that differ there but run this step at the same
    levels may share a batch. `batches` are the token ids of the text, each of shape (windows,
    T). At most `width` states share a batch; above 1, results may differ by the dtype's
    rounding. `block_runs` counts a block once for each batch of the text and state.
    """

    def __init__(
        self,
        partial: PartialForward,
        batches: Sequence[torch.Tensor],
        cache: StateCache,
        width: int = 1,
    ) -> None:
        self.partial = partial
        self.batches = batches
        self.cache = cache
        self.width = width
        self.block_runs = 0
        self._depth = len(partial.steps)

    def prefixes(self, plan: Plan) -> tuple[Plan, ...]:
        """The part of a plan before each step; the last entry is the plan itself."""
        return plan_prefixes(plan, self.partial.steps)

    def run(self, batch: int, plans: Sequence[Plan], visit: Visit) -> dict[Plan, torch.Tensor]:
        """Run plans on one batch of the text; returns each one's output, (windows, T, H).

        `visit` is called with the state that enters each step.
        """
        starts = {plan: self._nearest(batch, plan) for plan in plans}
        first = min(step for step, _ in starts.values())
        states: dict[Plan, torch.Tensor] = {}  # by the plan of what ran before the step
        for number in range(first, self._depth):
            for plan, (step, at) in starts.items():
                if step == number:
                    states[self.prefixes(plan)[number]] = at
            for prefix, state in states.items():
                visit((number, prefix), state)
            started = [plan for plan in plans if starts[plan][0] <= number]
            states = self._advance(number, states, started)
        return states

    def share_head(self, plans: Iterable[Plan]) -> Iterator[tuple[WeightLevel, Sequence[Plan]]]:
        """Groups of plans that may share a batch in the last norm and the head, and their level."""
        by_level: dict[WeightLevel, list[Plan]] = {}
        for plan in plans:
            by_level.setdefault(plan.embeddings, []).append(plan)
        for level, alike in by_level.items():
            for group in chunks(alike, self.width):
                yield level, group

    def _nearest(self, batch: int, plan: Plan) -> tuple[int, torch.Tensor]:
        """The last step whose state is cached for a plan, and that state."""
        prefixes = self.prefixes(plan)
        for number in reversed(range(self._depth)):
            state = self.cache.get(batch, (number, prefixes[number]))
            if state is not None:
                return number, state
        entered = self.partial.enter(self.batches[batch], plan.embeddings)
        self.cache.put(batch, (0, prefixes[0]), entered)
        return 0, entered

    def _advance(
        self, number: int, states: dict[Plan, torch.Tensor], plans: Sequence[Plan]
    ) -> dict[Plan, torch.Tensor]:
        """Run one step: from the states that enter it to its outputs, by the plan so far."""
        blocks, steps = self.partial.steps[number], self.partial.steps
        # For each way in which plans run this step: the prefix before and after it.
        ends: dict[Plan, dict[Plan, Plan]] = {}
        for plan in plans:
            prefixes = self.prefixes(plan)
            within = plan_steps(plan, steps)[number]
            ends.setdefault(within, {})[prefixes[number]] = prefixes[number + 1]
        after: dict[Plan, torch.Tensor] = {}
        for within, prefix_after in ends.items():
            kept = len(blocks) - len(within.removed)
            for group in chunks(list(prefix_after), self.width if kept else 1):
                self.block_runs += kept * len(group)
                inputs = [states[prefix] for prefix in group]
                output = self.partial.run(blocks, as_one_batch(inputs), within)
                outputs = torch.split(output, [len(state) for state in inputs])
                after |= {prefix_after[p]: own for p, own in zip(group, outputs, strict=True)}
        return after


def as_one_batch(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """States as one batch; a single one is not copied."""
    return states[0] if len(states) == 1 else torch.cat(list(states))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def tokens_at_once(device: torch.device, vocab_size: int) -> tuple[int, int]:
    """Tokens whose logits are in memory at a time: in the model's dtype, and in float32."""
    if device.type == "cpu":
        return HEAD_TOKENS, max(_LOSS_ROWS, _LOSS_LOGITS // vocab_size)
    most = max(1, _GPU_LOGITS // vocab_size)
    return most, most


def window_nll(
    partial: PartialForward,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    on_logits: OnLogits | None = None,
) -> torch.Tensor:
    """Mean NLL of each window, nats per token, float64, (windows,).

    `hidden` is the decoder's output for the tokens `ids`: (windows, T, H) and (windows, T).
    """
    rows, targets = predictions(hidden, ids)
    most, _ = tokens_at_once(rows.device, partial.head.out_features)
    losses = []
    for part, expected in zip(torch.split(rows, most), torch.split(targets, most), strict=True):
        logits = partial.logits(part)
        losses.append(token_nll(logits, expected))
        if on_logits is not None:
            on_logits(logits)
    return torch.cat(losses).view(ids.shape[0], -1).double().mean(dim=1)


def predictions(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict a token, (N, H), and the tokens to predict on their device, (N,)."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1).to(hidden.device)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL of each target in float32, (N, V) and (N,) -> (N,), a few float32 rows at a time."""
    _, most = tokens_at_once(logits.device, logits.shape[1])
    return torch.cat(
        [
            functional.cross_entropy(rows.float(), expected, reduction="none")
            for rows, expected in zip(
                torch.split(logits, most), torch.split(targets, most), strict=True
            )
        ]
    )
