"""Blocks of a decoder. Plain values without torch."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from rap_env.errors import UnknownNameError

BlockKind = Literal["attn", "ffn"]
KINDS: tuple[BlockKind, BlockKind] = ("attn", "ffn")

_NAME = re.compile(r"layer([0-9]+)\.(attn|ffn)")


@lru_cache(maxsize=4096)
def block_name(index: int) -> str:
    """The name of block `index`: ``layer07.attn`` for 14, ``layer07.ffn`` for 15.

    A mixture-of-experts layer is one ffn block.
    """
    return f"layer{index // 2:02d}.{KINDS[index % 2]}"


def block_index(block: str | int) -> int:
    """The index of a block given by its name or index.

    Raises:
        UnknownNameError: The name does not have the form ``layerNN.attn`` or ``layerNN.ffn``,
            or the index is negative or no integer.
    """
    if type(block) is int and block >= 0:  # by far the most frequent case
        return block
    if isinstance(block, str):
        match = _NAME.fullmatch(block)
        if match:
            return 2 * int(match[1]) + KINDS.index(match[2])
    elif not isinstance(block, bool) and hasattr(block, "__index__") and block.__index__() >= 0:
        return block.__index__()
    hint = "A block is written layerNN.attn or layerNN.ffn, or given by its index from 0."
    layer = re.match(r"layer[0-9]+", str(block))  # suggest a block of the layer that was meant
    known = [f"{layer[0] if layer else 'layer00'}.{kind}" for kind in KINDS]
    raise UnknownNameError("block", block, known, hint)
