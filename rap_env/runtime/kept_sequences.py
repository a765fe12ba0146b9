"""Caches of what was read, kept while there is room: for conversations and preempted requests.

Kept sequences are a tree of blocks of 32 tokens (`models.caches.cache_blocks`): sequences
with the same beginning share its blocks. Blocks are copies, so that nothing that runs depends
on them. They are found by comparing token ids, within one owner. Only the engine's thread may
call the store; numbers of bytes, sequences and tokens may be read from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

from rap_env.levels import GROUP_TOKENS
from rap_env.models.caches.cache_blocks import EMPTY_BLOCK, CacheBlock, CachedRow
from rap_env.models.caches.tensor_file import TensorFile
from rap_env.plan import Plan, with_lowest_caches
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_monitor import MemoryMonitor
from rap_env.runtime.plan_chooser import KeptQuality
from rap_env.runtime.request_handle import ReadPlans, Taken, TokenSequence

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.models.live.live_batch import LiveBatch

log = logging.getLogger(__name__)

_LOWERING_S = 0.05
"""Longest time for lowering and writing to files at a time while requests run."""

_PARTS = 32  # files in which the blocks are: one ends, and its bytes with it, once all are gone
_LEAST_BYTES = 4 * 2**20  # of a file, before another one is begun
Tokens = tuple[int, ...]
_NEW_SHARE = 0.1  # of the last measurement in the average seconds of a byte and a token


class KeptFiles:
    """Files for blocks that have no room in memory; each file ends with the last block in it.

    Args:
        folder: Where files are made; None if no disk may be used.
        most_bytes: Most bytes, but for what preempted requests need.

    Attributes:
        folder: As given; None once it cannot be written to.
        most_bytes: As given.
    """

    def __init__(self, folder: Path | None, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._refs: list[ref[TensorFile]] = []
        self._byte_s = self._token_s = 0.0

    @property
    def _files(self) -> list[TensorFile]:
        """The files that have not ended."""
        return [file for each in self._refs if (file := each()) is not None]

    @property
    def bytes(self) -> int:
        """Bytes of the files; any thread may ask."""
        return sum(file.bytes for file in self._files)

    def store(self, block: CacheBlock) -> CacheBlock | None:
        """The block in a file; None if none can be written."""
        if self.folder is None:
            return None
        files = self._files
        if not files or files[-1].bytes >= max(self.most_bytes // _PARTS, _LEAST_BYTES):
            files.append(TensorFile(self.folder))
            self._refs = [*map(ref, files)]
        try:
            return block.in_file(files[-1])
        except OSError as error:
            log.warning(
                "Caches that have no room in memory are computed again from now on: %s cannot be "
                "written to: %s.",
                self.folder,
                error,
            )
            self.folder = None
            return None

    def is_slow(self, block: CacheBlock, tokens: int) -> bool:
        """Whether reading a block from its file takes longer than computing its tokens."""
        return block.file_bytes * self._byte_s > tokens * self._token_s > 0

    def note_read(self, size: int, seconds: float) -> None:
        """So many bytes were read from files in some seconds."""
        if size:
            self._byte_s += (seconds / size - self._byte_s) * (_NEW_SHARE if self._byte_s else 1)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """So many tokens of prompts were computed in some seconds."""
        self._token_s += (seconds / tokens - self._token_s) * (_NEW_SHARE if self._token_s else 1)


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


class KeptSequences:
    """Keeps sequences that were read, and finds those that begin as another one does.

    Args:
        llm: The live model, whose `kept_bytes` include those of the store.
        monitor: Measures the room for it.
        quality: Which blocks may serve.
        files: Where what has no room in memory may be.
        keep: Whether sequences are kept that have ended. Preempted ones are in any case.

    Attributes:
        files: As given; so is `quality`.
        bytes: Bytes in memory.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        monitor: MemoryMonitor,
        quality: KeptQuality,
        files: KeptFiles,
        *,
        keep: bool,
    ) -> None:
        self._llm = llm
        self._monitor = monitor
        self._keep = keep
        self.quality = quality
        self.files = files
        self.bytes = 0
        self._trees: dict[TreeKey, Node] = {}
        # Least recently used first, and each block before the one that it follows.
        self._order: dict[Node, None] = {}
        self._waiting: dict[TokenSequence, tuple[Node, ...]] = {}

    @property
    def sequences(self) -> int:
        """Number of kept sequences."""
        return sum(not node.children for node in list(self._order))

    # Finding

    def match(self, sequence: TokenSequence) -> Match:
        """The longest beginning of a sequence that it may take over, without its last token."""
        best = Match()
        if sequence.scores_prompt:
            return best
        tokens = tuple(sequence.tokens[:-1])
        allows = functools.cache(functools.partial(self._allows, sequence))

        def may_use(node: Node) -> bool:
            if node.temporary and node not in self._waiting.get(sequence, ()):
                return False
            if self.files.is_slow(node.block, len(node.tokens)):
                return False
            return allows(node.plans, node.block.levels)

        owner, removed = self._owner(sequence), self._llm.removed_attention
        for tree, root in self._trees.items():
            if tree.owner == owner and tree.absent <= removed:
                found = longest_match(root, tokens, may_use, bool(tree.ending))
                best = max(best, found, key=lambda match: match.tokens)
        return best

    def take(self, sequence: TokenSequence, batch: LiveBatch) -> Taken:
        """Fill an empty batch with the kept beginning of a sequence."""
        taken = Taken()
        try:
            with self._llm.exclusive():
                path, tokens = self.match(sequence)
                if tokens:
                    blocks = [node.block for node in path]
                    began_s = time.perf_counter()
                    batch.fill(sequence.tokens[:tokens], blocks)
                    size = sum(block.file_bytes for block in blocks)
                    self.files.note_read(size, time.perf_counter() - began_s)
                    self._touch(path)
                    levels, counts, file_tokens = Plan(), Counter[str](), 0
                    for number, block in enumerate(blocks):
                        levels = with_lowest_caches(levels, block.levels)
                        count = min(GROUP_TOKENS, tokens - number * GROUP_TOKENS)
                        names = {level.name for _, level in block.levels.caches}
                        counts["/".join(sorted(names)) or "native"] += count
                        file_tokens += 0 if block.file is None else count
                    plans = frozenset(with_lowest_caches(each, levels) for each in path[-1].plans)
                    taken = Taken(tokens, counts, file_tokens, plans)
                    sequence.read = ReadPlans([(tokens, plans)])
                    sequence.refills = False
        except OSError as error:
            log.warning("A kept cache cannot be read, and is computed again: %s.", error)
        self._release(sequence)
        return taken

    def _allows(self, sequence: TokenSequence, plans: frozenset[Plan], levels: Plan) -> bool:
        handle = sequence.handle
        floor = handle.params.max_delta_nll
        return self.quality.may_use(plans, levels, handle.final_tokens, floor)

    def _owner(self, sequence: TokenSequence) -> str:
        return sequence.owner if self._keep else f"request {sequence.handle.id}"

    # Keeping

    def put(
        self,
        sequence: TokenSequence,
        row: CachedRow | None,
        read: ReadPlans,
        shape: BatchShape,
        *,
        waiting: bool = False,
    ) -> bool:
        """Keep a row of a sequence, as far as there is room; blocks that are kept stay.

        While the sequence goes on, new blocks are added for as long as `_LOWERING_S`, and at
        least one, unless only the whole row would serve.

        Args:
            sequence: The sequence.
            row: Its cache, or None.
            read: The plans under which that was computed.
            shape: The batch that runs, beside which there has to be room.
            waiting: Whether the sequence was preempted. All of it is needed then until the
                sequence continues or ends, and what has no room is written to a file. What a
                sequence adds whose prompt is not read yet is removed after that.

        Returns:
            Whether the next call has to go on.
        """
        if row is None or not (self._keep or waiting):
            return False
        at_once = waiting or sequence.handle.done or row.ending
        deadline_s = math.inf if at_once else time.perf_counter() + _LOWERING_S
        added = unfinished = False
        temporary = not self._keep or (waiting and not sequence.handle.token_ids)
        tree = TreeKey(self._owner(sequence), row.absent, row.ending)
        node = self._trees.setdefault(tree, Node(()))
        path: list[Node] = []
        for number, first in enumerate(range(0, len(row.tokens), GROUP_TOKENS)):
            tokens = row.tokens[first : first + GROUP_TOKENS]
            ends = bool(row.ending) and first + len(tokens) == len(row.tokens)
            plans = read.plans(first + len(tokens))
            child = self._child(node, tokens, plans, sequence, ends=ends)
            if child is None:
                if unfinished := added and time.perf_counter() > deadline_s:
                    break
                block = self._placed(row.block(number), plans, path, shape, waiting=waiting)
                if block is None:
                    break
                child = self._add(node, Node(tokens, node, plans=plans, temporary=temporary), block)
                added = True
            child.temporary &= temporary
            self._bring_back(child, shape)
            path.append(child)
            node = child
        self._touch(path)
        if waiting:
            self._waiting[sequence] = tuple(path)
        self._remove_empty()
        return unfinished

    def _child(
        self,
        node: Node,
        tokens: Tokens,
        plans: frozenset[Plan],
        sequence: TokenSequence,
        *,
        ends: bool,
    ) -> Node | None:
        """The block that follows a node, if it is kept and no worse than a new one."""
        children = [node.children[tokens]] if tokens in node.children else []
        if len(tokens) < GROUP_TOKENS and not ends:
            longer = [c for t, c in node.children.items() if t[: len(tokens)] == tokens]
            children += [child for child in longer if not child.temporary]
        for child in children:
            if ends and not child.block.ends:
                continue
            if child.plans == plans or self._allows(sequence, child.plans, child.block.levels):
                return child
        return None

    def _placed(
        self,
        block: CacheBlock,
        plans: frozenset[Plan],
        path: Sequence[Node],
        shape: BatchShape,
        *,
        waiting: bool,
    ) -> CacheBlock | None:
        """A block in memory, else with fewer bits, else in a file; None if there is no room."""
        while (need := block.bytes - self._free_room_bytes(shape)) > 0:
            if not self.free(need, at_once=False, beside=path):
                break
        room = self._free_room_bytes(shape)
        if block.bytes <= room:
            return block
        for bits in self.quality.useful_bits(plans):
            if block.lowered_bytes(bits) <= room:
                return block.lowered(bits)
        return self.files.store(block) if waiting else None

    def _free_room_bytes(self, shape: BatchShape) -> int:
        """Bytes that may be kept beside a batch and are not."""
        return self._monitor.room_for_kept(shape) - self.bytes

    def _bring_back(self, node: Node, shape: BatchShape) -> None:
        """Bring a block that is used from its file back to memory that is free."""
        block = node.block
        if block.file is not None and block.file_bytes <= self._free_room_bytes(shape):
            with contextlib.suppress(OSError):  # the next request that needs it logs why
                began_s = time.perf_counter()
                self._set_block(node, block.in_memory())
                self.files.note_read(block.file_bytes, time.perf_counter() - began_s)

    def _add(self, parent: Node, new: Node, block: CacheBlock) -> Node:
        """Let a block follow a node, in place of one with the same tokens or part of them."""
        tokens = new.tokens
        node = parent.children.get(tokens)
        if node is not None:
            self._set_block(node, block)
            node.plans = new.plans
            return node
        for known, child in list(parent.children.items()):
            part = known == tokens[: len(known)] and not child.block.ends
            if part and child.temporary >= new.temporary and not self._needed(child):
                self._remove(child)
        parent.children[tokens] = new
        self._set_block(new, block)
        self._order[new] = None
        return new

    def _set_block(self, node: Node, block: CacheBlock) -> None:
        change = block.bytes - node.block.bytes
        node.block = block
        self.bytes += change
        self._llm.kept_bytes += change

    def _touch(self, path: Sequence[Node]) -> None:
        """Note that blocks are used, the last one first, so that it goes before the others."""
        for node in reversed(path):
            del self._order[node]
            self._order[node] = None

    # Dropping

    def free(self, need_bytes: int, at_once: bool = True, beside: Collection[Node] = ()) -> bool:
        """Free at least so many bytes, or all: lower what is still useful then, and drop.

        What was used least recently goes first. What no lowering saves is dropped before
        anything is lowered, since that takes time. What is dropped goes to files, if there are
        any. Both end after `_LOWERING_S`.

        Args:
            need_bytes: Bytes.
            at_once: Whether what it has not freed then is dropped, else the next call goes on.
            beside: Blocks that stay.

        Returns:
            Whether the next call has to go on.
        """
        deadline_s = time.perf_counter() + _LOWERING_S
        most = self.bytes - need_bytes
        stays = set(beside)
        nodes = [node for node in self._order if node not in stays]
        read_under = {node.plans for node in nodes}
        useful = {plans: self.quality.useful_bits(plans) for plans in read_under}
        least = {n: n.block.lowered_bytes(next(reversed(useful[n.plans]), {})) for n in nodes}
        lowest = self.bytes - sum(node.block.bytes - size for node, size in least.items())
        for node, size in least.items():
            if lowest <= most:
                break
            lowest -= size
            self._drop(node, deadline_s)
        late = False
        for number, node in itertools.product(range(2), nodes):
            if late or self.bytes <= most:
                break
            for bits in useful[node.plans][number : number + 1]:
                if node.block.lowered_bytes(bits) < node.block.bytes:
                    self._set_block(node, node.block.lowered(bits))
                    late = time.perf_counter() > deadline_s
        unfinished = late and not at_once and self.bytes > most
        for node in nodes:
            if self.bytes <= most or unfinished:
                break
            self._drop(node, deadline_s)
        self._limit_files(stays)
        return unfinished

    def _drop(self, node: Node, deadline_s: float) -> None:
        """Write a block to a file, until a time if no request needs it, or drop it.

        All that follow a dropped block are dropped with it.
        """
        block, stored = node.block, None
        if node not in self._order or block.file is not None:
            return
        fits = block.bytes <= self.files.most_bytes and time.perf_counter() < deadline_s
        if fits or self._needed(node):
            stored = self.files.store(block)
        if stored is None:
            self._remove(node)
        else:
            self._set_block(node, stored)

    def _limit_files(self, beside: Collection[Node] = ()) -> None:
        """Drop what no request needs from files above their limit, least recently used first."""
        for node in list(self._order):
            if self.files.bytes <= self.files.most_bytes:
                break
            if node.block.file and node not in beside and not self._needed(node):
                self._remove(node)

    def _remove(self, node: Node) -> None:
        for child in list(node.children.values()):
            self._remove(child)
        self._set_block(node, EMPTY_BLOCK)
        self._order.pop(node, None)
        if node.parent is not None and node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]

    def _needed(self, node: Node) -> bool:
        """Whether a preempted request needs a block."""
        return any(node in path for path in self._waiting.values())

    def _remove_empty(self) -> None:
        for tree in [tree for tree, root in self._trees.items() if not root.children]:
            del self._trees[tree]

    def _release(self, sequence: TokenSequence) -> None:
        """Note that a preempted sequence has continued or ended."""
        for node in reversed(self._waiting.pop(sequence, ())):
            if node.temporary and not self._needed(node):
                self._remove(node)
        self._limit_files()
        self._remove_empty()

    def release_ended(self) -> None:
        """Drop what only preempted sequences needed that have ended."""
        for sequence in [each for each in self._waiting if each.handle.done]:
            self._release(sequence)

    def close(self) -> None:
        """Drop all."""
        self._waiting.clear()
        for node in list(self._order):
            self._remove(node)
        self._trees.clear()
