"""Finding kept blocks: the tree that sequences with one beginning share, and which blocks serve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from rap_env.levels import GROUP_TOKENS, CacheLevel
from rap_env.models.caches.cache_blocks import EMPTY_BLOCK, CacheBlock
from rap_env.plan import Plan, with_lowest_caches
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.sequence import TokenSequence

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM

RECENT_S = 30.0
"""Seconds for which a plan that ran may be the one that a new request will run with."""
Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A block of a sequence, with the blocks that follow it; only whole blocks have some.

    Attributes:
        tokens: Its tokens; none for the root of a tree.
        parent: The block before it.
        block: Their keys and values; an empty one for a root and for what was dropped.
        plans: The plans under which they and all tokens before them were read.
        children: The blocks that follow it, by their tokens.
        temporary: Whether only preempted requests have it, and none has read its prompt.
    """

    tokens: Tokens
    parent: Node | None = None
    block: CacheBlock = EMPTY_BLOCK
    plans: frozenset[Plan] = frozenset()
    children: dict[Tokens, Node] = field(default_factory=dict)
    temporary: bool = False


class TreeKey(NamedTuple):
    """What all sequences of a tree have in common.

    Attributes:
        owner: Whose they are.
        absent: Layers whose keys and values they lack.
        ending: Layers that know only the last tokens (see `CachedRow`).
    """

    owner: str
    absent: frozenset[int]
    ending: frozenset[int]


class Match(NamedTuple):
    """The beginning of a sequence that is kept: its blocks, and tokens of them all."""

    path: tuple[Node, ...] = ()
    tokens: int = 0


def longest_match(
    root: Node, tokens: Tokens, may_use: Callable[[Node], bool], whole: bool
) -> Match:
    """The longest beginning of tokens below a root.

    Args:
        root: The root.
        tokens: The tokens.
        may_use: Whether a block may be used.
        whole: Whether only whole sequences serve.
    """
    path: list[Node] = []
    best, node = Match(), root
    while True:
        first = len(path) * GROUP_TOKENS
        rest = tokens[first : first + GROUP_TOKENS]
        following = node.children.get(rest) if len(rest) == GROUP_TOKENS else None
        if following is not None and not may_use(following):
            following = None
        if following is None or whole:
            for child in node.children.values():
                count = _common(child.tokens, rest)
                if whole and (count < len(child.tokens) or not child.block.ends):
                    continue
                if count and first + count > best.tokens and may_use(child):
                    best = Match((*path, child), first + count)
        if following is None:
            return best
        path.append(following)
        if not whole:
            best = Match(tuple(path), first + GROUP_TOKENS)
        node = following


def _common(tokens: Tokens, others: Tokens) -> int:
    """Tokens with which two sequences begin alike."""
    pairs = zip(tokens, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class KeptQuality:
    """The bound on how much worse than the plan of a request what is kept may be.

    A block is used for a request if each plan under which it was read, with the levels that
    its keys and values have now, predicts a rise in NLL of at most `max_rise` more than the
    plan of the request, and no more than the floors allow. The plan of a request is the worst
    of the present one and of those that ran in the last `RECENT_S`: where the budget moves, a
    request that begins in a good moment runs under lower plans too. With a `max_rise` of 0 it
    is the present plan alone. Without predictions, only equal plans are used.

    Args:
        llm: The live model.
        chooser: Predicts the rise in NLL of plans.
        max_rise: Nats per token.
        clock: Gives the time in seconds.

    Attributes:
        max_rise: As given.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        chooser: PlanChooser,
        max_rise: float,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._clock = clock
        self._last_ran_s: dict[Plan, float] = {}
        self.max_rise = max_rise
        self._useful_bits = lru_cache(maxsize=16)(self._find_useful_bits)

    def note_pass(self, plan: Plan) -> None:
        """The model has run with a plan."""
        self._last_ran_s[plan] = self._clock()

    def may_use(self, plans: frozenset[Plan], levels: Plan, sequence: TokenSequence) -> bool:
        """Whether blocks read under plans, with present levels, may serve a sequence."""
        handle = sequence.handle
        return self._allows(plans, levels, handle.final_tokens, handle.params.max_delta_nll)

    def useful_bits(self, plans: frozenset[Plan]) -> list[dict[int, int]]:
        """Bits of layers to which what was read under plans may be lowered, and still serve."""
        tokens = self._llm.facts.max_positions
        useful = self._useful_bits(self._llm.plan, self._chooser.max_delta_nll)
        return [bits for bits in useful if self._allows(plans, _caches(bits), tokens)]

    def _allows(
        self, plans: frozenset[Plan], levels: Plan, tokens: int, floor: float | None = None
    ) -> bool:
        """As `may_use`, for sequences of so many tokens with a floor of their own."""
        plan = self._llm.plan
        own = {with_lowest_caches(each, levels) for each in plans}
        if own == {plan}:
            return True
        rise = self._chooser.rise
        of_plan = rise(plan, tokens)
        if of_plan is None:
            return False
        recent = (rise(each, tokens) for each in self._recent_plans())
        worst = max([of_plan, *(each for each in recent if each is not None)])
        floors = self._chooser.max_delta_nll, floor
        most = min([worst + self.max_rise, *(each for each in floors if each is not None)])
        return all(
            (own_rise := rise(each, tokens)) is not None and own_rise <= most for each in own
        )

    def _recent_plans(self) -> Iterable[Plan]:
        oldest_s = self._clock() - RECENT_S
        self._last_ran_s = {p: s for p, s in self._last_ran_s.items() if s >= oldest_s}
        return self._last_ran_s if self.max_rise else ()

    def _find_useful_bits(self, plan: Plan, floor: float | None) -> list[dict[int, int]]:
        """As `useful_bits`, for what is read under the present plan, with a floor.

        First int8 in all layers, then int4 in as many as the bound allows, those with the
        least predicted rise first.
        """
        layers, useful = range(self._llm.adapter.num_layers), list[dict[int, int]]()
        most = self._rise_at(plan, {}) + self.max_rise
        most = most if floor is None else min(most, floor)
        extra = {n: self._rise_at(plan, {n: 4}) - self._rise_at(plan, {n: 8}) for n in layers}
        bits = dict.fromkeys(layers, 8)
        for layer in (None, *sorted(extra, key=extra.__getitem__)):
            lowered = bits if layer is None else bits | {layer: 4}
            if not self._rise_at(plan, lowered) <= most:
                break
            useful, bits = [*useful[:1], lowered], lowered
        return useful

    def _rise_at(self, plan: Plan, bits: Mapping[int, int]) -> float:
        """Rise in NLL of a plan with caches of so many bits; NaN without a prediction."""
        tokens = self._llm.facts.max_positions
        rise = self._chooser.rise(with_lowest_caches(plan, _caches(bits)), tokens)
        return math.nan if rise is None else rise


def _caches(bits: Mapping[int, int]) -> Plan:
    """A plan in which caches have so many bits, by layer."""
    return Plan(caches=tuple((layer, CacheLevel(count)) for layer, count in bits.items()))
