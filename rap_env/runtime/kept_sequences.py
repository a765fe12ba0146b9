"""Caches of what was read, kept while there is room: for conversations and preempted requests.

Kept sequences are a tree of blocks of 32 tokens (`models.caches.cache_blocks`): sequences
with the same beginning share its blocks. Blocks are copies, so that nothing that runs depends
on them. They are found by comparing token ids, within one owner. Only the engine's thread may
call the store; numbers of bytes, sequences and tokens may be read from any thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rap_env.levels import GROUP_TOKENS, CacheLevel
from rap_env.models.caches.cache_blocks import CacheBlock, CachedRow
from rap_env.models.caches.tensor_file import TensorFile
from rap_env.plan import Plan, with_lowest_caches
from rap_env.request import KEPT_DELTA_NLL
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.runtime.sequence import ReadPlans, TokenSequence

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.models.live.live_batch import LiveBatch

log = logging.getLogger(__name__)

_LOWERING_S = 0.05
"""Longest time for lowering after a fall of the limit."""

_Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """A block of a sequence, with the blocks that follow it; only whole blocks have some.

    Attributes:
        tokens: Its tokens; none for the root of a tree.
        parent: The block before it.
        block: Their keys and values; None for a root.
        plans: The plans under which they and all tokens before them were read.
        children: The blocks that follow it, by their tokens.
    """

    tokens: _Tokens
    parent: _Node | None = None
    block: CacheBlock | None = None
    plans: frozenset[Plan] = frozenset()
    children: dict[_Tokens, _Node] = field(default_factory=dict)


class _Tree(NamedTuple):
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

    path: tuple[_Node, ...] = ()
    tokens: int = 0


class Taken(NamedTuple):
    """What a sequence took over.

    Attributes:
        tokens: Number of its first tokens.
        levels: The levels that their keys and values had, in words.
        plans: The plans under which they were read, with those levels.
    """

    tokens: int = 0
    levels: str = ""
    plans: frozenset[Plan] = frozenset()


class KeptSequences:
    """Keeps sequences that were read, and finds those that begin as another one does.

    A block is used for a request if each plan under which it was read, with the levels that
    its keys and values have now, predicts a rise in NLL of at most `max_rise` more than the
    present plan, and no more than the floors allow. Without predictions, only equal plans
    are used.

    Args:
        llm: The live model, whose `kept_bytes` include those of the store.
        chooser: Predicts the rise in NLL of plans.
        folder: Where preempted requests may have files, which have no name and end with the
            process; None if no disk may be used.
        keep: Whether sequences are kept that have ended. Preempted ones are in any case.
        max_rise: Nats per token.

    Attributes:
        folder: The folder; None if no disk may be used, or none any more.
        room_bytes: Gives the bytes that the store may take now.
        bytes: Bytes in memory.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        chooser: PlanChooser,
        folder: Path | None,
        *,
        keep: bool = True,
        max_rise: float = KEPT_DELTA_NLL,
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._keep = keep
        self._max_rise = max_rise
        self.folder = folder
        self.room_bytes: Callable[[], int] = lambda: 0
        self.bytes = 0
        self._trees: dict[_Tree, _Node] = {}
        # Least recently used first, and each block before the one that it follows.
        self._order: dict[_Node, None] = {}
        self._useful_bits = lru_cache(maxsize=16)(self._find_useful_bits)
        self._waiting: dict[TokenSequence, tuple[_Node, ...]] = {}

    @property
    def sequences(self) -> int:
        """Number of kept sequences."""
        return sum(not node.children for node in list(self._order))

    # Finding

    def match(self, sequence: TokenSequence) -> Match:
        """The longest beginning of a sequence that it may take over, without its last token."""
        best = Match()
        if not sequence.resumable or not self._trees:
            return best
        tokens = tuple(sequence.tokens[:-1])
        usable: dict[tuple[frozenset[Plan], Plan], bool] = {}

        def may_use(node: _Node) -> bool:
            assert node.block is not None
            key = node.plans, node.block.levels
            if key not in usable:
                usable[key] = self._may_use(*key, sequence)
            return usable[key]

        owner, removed = self._owner(sequence), self._llm.removed_attention
        for tree, root in self._trees.items():
            if tree.owner == owner and tree.absent <= removed:
                found = _longest(root, tokens, may_use, bool(tree.ending))
                best = max(best, found, key=lambda match: match.tokens)
        return best

    def take(self, sequence: TokenSequence, batch: LiveBatch) -> Taken:
        """Fill an empty batch with the kept beginning of a sequence."""
        taken = Taken()
        try:
            with self._llm.exclusive():
                path, tokens = self.match(sequence)
                if tokens:
                    blocks = [node.block for node in path if node.block is not None]
                    batch.fill(sequence.tokens[:tokens], blocks)
                    self._touch(path)
                    levels = Plan()
                    for block in blocks:
                        levels = with_lowest_caches(levels, block.levels)
                    names = {level.name for _, level in levels.caches}
                    plans = frozenset(with_lowest_caches(each, levels) for each in path[-1].plans)
                    taken = Taken(tokens, "/".join(sorted(names)) or "native", plans)
                    sequence.read = ReadPlans([(tokens, plans)])
                    sequence.refills = False
        except OSError as error:
            log.warning("A kept cache cannot be read, and is computed again: %s.", error)
        self._release(sequence)
        return taken

    def _may_use(self, plans: frozenset[Plan], levels: Plan, sequence: TokenSequence) -> bool:
        plan, tokens = self._llm.plan, sequence.handle.final_tokens
        own = {with_lowest_caches(each, levels) for each in plans}
        if own == {plan}:
            return True
        rise = self._chooser.rise
        present = rise(plan, tokens)
        if present is None:
            return False
        bounds = (
            present + self._max_rise,
            self._chooser.max_delta_nll,
            sequence.handle.max_delta_nll,
        )
        most = min(bound for bound in bounds if bound is not None)
        return all(
            (own_rise := rise(each, tokens)) is not None and own_rise <= most for each in own
        )

    def _owner(self, sequence: TokenSequence) -> str:
        return sequence.owner if self._keep else f"request {sequence.handle.id}"

    # Keeping

    def put(
        self,
        sequence: TokenSequence,
        row: CachedRow | None,
        read: ReadPlans,
        *,
        waiting: bool = False,
    ) -> None:
        """Keep a row of a sequence, as far as there is room; blocks that are kept stay.

        Args:
            sequence: The sequence.
            row: Its cache, or None.
            read: The plans under which that was computed.
            waiting: Whether the sequence was preempted. What has no room is written to a file
                then, and all is needed until the sequence continues or ends.
        """
        if row is None or not (self._keep or waiting):
            return
        tree = _Tree(self._owner(sequence), row.absent, row.ending)
        node = self._trees.setdefault(tree, _Node(()))
        file = None if self.folder is None or not waiting else TensorFile(self.folder)
        path: list[_Node] = []
        for number, first in enumerate(range(0, len(row.tokens), GROUP_TOKENS)):
            tokens = row.tokens[first : first + GROUP_TOKENS]
            ends = bool(row.ending) and first + len(tokens) == len(row.tokens)
            plans = read.plans(first + len(tokens))
            child = self._child(node, tokens, plans, sequence, ends=ends)
            if child is None:
                block = self._placed(row.block(number), path, file)
                if block is None:
                    break
                child = self._add(node, tokens, block, plans)
            path.append(child)
            node = child
        self._touch(path)
        if waiting:
            self._waiting[sequence] = tuple(path)
        self._remove_empty()

    def _child(
        self,
        node: _Node,
        tokens: _Tokens,
        plans: frozenset[Plan],
        sequence: TokenSequence,
        *,
        ends: bool,
    ) -> _Node | None:
        """The block that follows a node, if it is kept and no worse than a new one."""
        children = [node.children[tokens]] if tokens in node.children else []
        if len(tokens) < GROUP_TOKENS and not ends:
            children += [c for t, c in node.children.items() if t[: len(tokens)] == tokens]
        for child in children:
            block = child.block
            assert block is not None
            if ends and not block.ends:
                continue
            if child.plans == plans or self._may_use(child.plans, block.levels, sequence):
                return child
        return None

    def _placed(
        self, block: CacheBlock, path: Sequence[_Node], file: TensorFile | None
    ) -> CacheBlock | None:
        """A block in memory, else with fewer bits, else in a file; None if there is no room."""
        need = self.bytes + block.bytes - self.room_bytes()
        if need > 0:
            self.free(need, path, at_once=False)
        room = self.room_bytes() - self.bytes
        if block.bytes <= room:
            return block
        for bits in self._useful_bits(self._llm.plan):
            if block.lowered_bytes(bits) <= room:
                return block.lowered(bits)
        return None if file is None else self._stored(block, file)

    def _stored(self, block: CacheBlock, file: TensorFile) -> CacheBlock | None:
        try:
            return block.in_file(file)
        except OSError as error:
            log.warning(
                "The caches of preempted requests stay in memory from now on: %s cannot be "
                "written to: %s.",
                self.folder,
                error,
            )
            self.folder = None
            return None

    def _add(
        self, parent: _Node, tokens: _Tokens, block: CacheBlock, plans: frozenset[Plan]
    ) -> _Node:
        """Let a block follow a node, in place of one with the same tokens or part of them."""
        node = parent.children.get(tokens)
        if node is not None:
            self._set_block(node, block)
            node.plans = plans
            return node
        for known, child in list(parent.children.items()):
            part = known == tokens[: len(known)] and not self._needed(child)
            if part and child.block is not None and not child.block.ends:
                self._remove(child)
        node = parent.children[tokens] = _Node(tokens, parent, None, plans)
        self._set_block(node, block)
        self._order[node] = None
        return node

    def _set_block(self, node: _Node, block: CacheBlock | None) -> None:
        before = 0 if node.block is None else node.block.bytes
        node.block = block
        change = (0 if block is None else block.bytes) - before
        self.bytes += change
        self._llm.kept_bytes += change

    def _touch(self, path: Sequence[_Node]) -> None:
        """Note that blocks are used, the last one first, so that it goes before the others."""
        for node in reversed(path):
            if node in self._order:
                del self._order[node]
                self._order[node] = None

    # Dropping

    def free(
        self, need_bytes: int, beside: Collection[_Node] = (), *, at_once: bool = True
    ) -> None:
        """Free at least so many bytes, or all: lower what is still useful then, and drop.

        What was used least recently goes first. What no lowering saves is dropped before
        anything is lowered, since that takes time.

        Args:
            need_bytes: Bytes.
            beside: Blocks that stay.
            at_once: Whether what `_LOWERING_S` of lowering do not free is dropped.
        """
        deadline_s = time.perf_counter() + (_LOWERING_S if at_once else math.inf)
        most = self.bytes - need_bytes
        useful = self._useful_bits(self._llm.plan) if most > 0 else []
        stays = set(beside)
        nodes = [node for node in self._order if node.block is not None and node not in stays]
        least = {n: n.block.lowered_bytes(useful[-1]) for n in nodes if n.block and useful}
        lowest = self.bytes - sum(n.block.bytes for n in least if n.block) + sum(least.values())
        for node, size in least.items():
            if lowest <= most:
                break
            lowest -= size
            self._drop(node)
        for bits, node in itertools.product(useful, nodes):
            if self.bytes <= most or time.perf_counter() > deadline_s:
                break
            block = node.block
            if block is not None and block.lowered_bytes(bits) < block.bytes:
                self._set_block(node, block.lowered(bits))
        for node in nodes:
            if self.bytes <= most:
                break
            self._drop(node)

    def _find_useful_bits(self, plan: Plan) -> list[dict[int, int]]:
        """Bits of layers to which what is read under a plan may be lowered, and still serve it.

        First int8 in all layers, then int4 in as many as the bound allows, those with the
        least predicted rise first.
        """
        layers, useful = range(self._llm.adapter.num_layers), list[dict[int, int]]()
        present = self._rise_at(plan, {})
        extra = {n: self._rise_at(plan, {n: 4}) - self._rise_at(plan, {n: 8}) for n in layers}
        bits = dict.fromkeys(layers, 8)
        for layer in (None, *sorted(extra, key=extra.__getitem__)):
            lowered = bits if layer is None else bits | {layer: 4}
            if not self._rise_at(plan, lowered) <= present + self._max_rise:
                break
            useful, bits = [*useful[:1], lowered], lowered
        return useful

    def _rise_at(self, plan: Plan, bits: Mapping[int, int]) -> float:
        """Rise in NLL of a plan with caches of so many bits; NaN without a prediction."""
        lowered = Plan(caches=tuple((n, CacheLevel(b)) for n, b in bits.items()))
        tokens = self._llm.facts.max_positions
        rise = self._chooser.rise(with_lowest_caches(plan, lowered), tokens)
        return math.nan if rise is None else rise

    def _drop(self, node: _Node) -> None:
        """Drop a block with all that follow it, or write to a file what a request needs."""
        block = node.block
        if block is None or block.file is not None:
            return
        stored = None
        if self._needed(node) and self.folder is not None:
            stored = self._stored(block, TensorFile(self.folder))
        if stored is None:
            self._remove(node)
        else:
            self._set_block(node, stored)

    def _remove(self, node: _Node) -> None:
        for child in list(node.children.values()):
            self._remove(child)
        self._set_block(node, None)
        self._order.pop(node, None)
        if node.parent is not None and node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]

    def _needed(self, node: _Node) -> bool:
        """Whether a preempted request needs a block."""
        return any(node in path for path in self._waiting.values())

    def _remove_empty(self) -> None:
        for tree in [tree for tree, root in self._trees.items() if not root.children]:
            del self._trees[tree]

    def _release(self, sequence: TokenSequence) -> None:
        """Note that a preempted sequence has continued or ended; its files end with that."""
        for node in reversed(self._waiting.pop(sequence, ())):
            in_file = node.block is not None and node.block.file is not None
            if (in_file or not self._keep) and not self._needed(node):
                self._remove(node)
        self._remove_empty()

    def release_ended(self) -> None:
        """Drop the files of preempted sequences that have ended."""
        for sequence in [each for each in self._waiting if each.handle.done]:
            self._release(sequence)

    def close(self) -> None:
        """Drop all."""
        self._waiting.clear()
        for root in self._trees.values():
            for node in list(root.children.values()):
                self._remove(node)
        self._trees.clear()


def _longest(root: _Node, tokens: _Tokens, may_use: Callable[[_Node], bool], whole: bool) -> Match:
    """The longest beginning of tokens below a root.

    Args:
        root: The root.
        tokens: The tokens.
        may_use: Whether a block may be used.
        whole: Whether only whole sequences serve.
    """
    path: list[_Node] = []
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
                if whole and (
                    count < len(child.tokens) or child.block is None or not child.block.ends
                ):
                    continue
                if count and first + count > best.tokens and may_use(child):
                    best = Match((*path, child), first + count)
        if following is None:
            return best
        path.append(following)
        if not whole:
            best = Match(tuple(path), first + GROUP_TOKENS)
        node = following


def _common(tokens: _Tokens, others: _Tokens) -> int:
    """Tokens with which two sequences begin alike."""
    count = 0
    for token, other in zip(tokens, others, strict=False):
        if token != other:
            break
        count += 1
    return count
