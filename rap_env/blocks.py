"""Blocks of a decoder, and masks: sets of removed blocks. Plain values without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

from rap_env.errors import ArtifactError, UnknownNameError

BlockKind = Literal["attn", "ffn"]
KINDS: tuple[BlockKind, BlockKind] = ("attn", "ffn")

_NAME = re.compile(r"layer([0-9]+)\.(attn|ffn)")
_INT = frozenset((int,))


@lru_cache(maxsize=4096)
def block_name(index: int) -> str:
    """The name of block `index`: ``layer07.attn`` for 14, ``layer07.ffn`` for 15."""
    return f"layer{index // 2:02d}.{KINDS[index % 2]}"


def block_index(block: Block | str | int) -> int:
    """The index of a block given as `Block`, name or index.

    Raises:
        UnknownNameError: The name does not have the form ``layerNN.attn`` or ``layerNN.ffn``,
            or the index is negative or no integer.
    """
    if type(block) is int and block >= 0:  # by far the most frequent case
        return block
    if isinstance(block, Block):
        return block.index
    if isinstance(block, str):
        match = _NAME.fullmatch(block)
        if match:
            return 2 * int(match[1]) + KINDS.index(match[2])
    elif not isinstance(block, bool) and hasattr(block, "__index__") and block.__index__() >= 0:
        return block.__index__()
    hint = "A block is written layerNN.attn or layerNN.ffn, or given by its index from 0."
    raise UnknownNameError("block", block, ["layer00.attn", "layer00.ffn"], hint)


@dataclass(frozen=True, order=True)
class Block:
    """One residual sub-layer of the decoder.

    Attributes:
        index: ``2 * layer`` for attention, ``2 * layer + 1`` for feed-forward.
        param_bytes: Bytes of the tensors that only this block uses, including its norms.
    """

    index: int
    param_bytes: int

    @property
    def layer(self) -> int:
        """Number of the decoder layer, from 0."""
        return self.index // 2

    @property
    def kind(self) -> BlockKind:
        """``"attn"`` or ``"ffn"`` (a mixture-of-experts layer is one ffn block)."""
        return KINDS[self.index % 2]

    @property
    def name(self) -> str:
        """``layer07.attn`` or ``layer07.ffn``."""
        return block_name(self.index)


@dataclass(frozen=True)
class BlockMask:
    """The set of removed blocks: a frozen, hashable value. ``BlockMask()`` is the dense model.

    Iteration yields block indices in ascending order. Set operations return new masks.

    Attributes:
        indices: The indices of the removed blocks.

    Raises:
        UnknownNameError: An index does not name a block.

    >>> mask = BlockMask.of("layer03.ffn", 14)
    >>> mask.names
    ('layer03.ffn', 'layer07.attn')
    >>> 7 in mask, "layer03.ffn" in mask, len(mask | BlockMask.of(0))
    (True, True, 3)
    """

    indices: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        found = self.indices
        # Nearly always they are indices already, which this tells faster than one call for each.
        if type(found) is frozenset and {*map(type, found)} <= _INT and min(found, default=0) >= 0:
            return
        object.__setattr__(self, "indices", frozenset(map(block_index, found)))

    @classmethod
    def of(cls, *blocks: Block | str | int) -> BlockMask:
        """A mask that removes the given blocks (objects, names or indices).

        Raises:
            UnknownNameError: One of them does not name a block.
        """
        return cls(frozenset(map(block_index, blocks)))

    @classmethod
    def all_of(cls, blocks: Iterable[Block], kind: BlockKind | None = None) -> BlockMask:
        """A mask that removes all `blocks`, or all of one kind."""
        return cls(frozenset(b.index for b in blocks if kind is None or b.kind == kind))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the removed blocks, in ascending order of index."""
        return tuple(map(block_name, self))

    def count(self, kind: BlockKind) -> int:
        """Number of removed blocks of one kind."""
        return sum(KINDS[i % 2] == kind for i in self.indices)

    def check(self, num_blocks: int) -> BlockMask:
        """Return the mask itself if all its blocks exist in a model with `num_blocks` blocks.

        Raises:
            UnknownNameError: It names a block that the model does not have.
        """
        worst = max(self.indices, default=-1)
        if worst >= num_blocks:
            known = [f"layer00.attn ... {block_name(num_blocks - 1)}"]
            raise UnknownNameError("block", block_name(worst), known)
        return self

    def to_json(self) -> str:
        """A JSON list of block names."""
        return json.dumps(self.names)

    @classmethod
    def from_json(cls, text: str) -> BlockMask:
        """The mask that `to_json` wrote.

        Raises:
            ArtifactError: The text is no JSON list.
            UnknownNameError: An entry does not name a block.
        """
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"A mask should be a JSON list of block names: {error}.") from None
        if not isinstance(names, list):
            raise ArtifactError(f"A mask should be a JSON list of block names, not {text!r}.")
        return cls.of(*names)

    def __contains__(self, block: Block | str | int) -> bool:
        return block_index(block) in self.indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.indices))

    def __or__(self, other: BlockMask) -> BlockMask:
        return BlockMask(self.indices | other.indices)

    def __and__(self, other: BlockMask) -> BlockMask:
        return BlockMask(self.indices & other.indices)

    def __sub__(self, other: BlockMask) -> BlockMask:
        return BlockMask(self.indices - other.indices)

    def __le__(self, other: BlockMask) -> bool:
        return self.indices <= other.indices

    def __str__(self) -> str:
        return "dense" if not self.indices else f"without {', '.join(self.names)}"


def every_mask(num_blocks: int) -> Iterator[BlockMask]:
    """All masks of a model, those that remove few blocks first."""
    for count in range(num_blocks + 1):
        yield from (BlockMask.of(*chosen) for chosen in combinations(range(num_blocks), count))
