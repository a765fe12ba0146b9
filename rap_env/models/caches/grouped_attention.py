"""Attention over a cache that is stored in groups, in pieces of a bounded workspace.

Shapes: B sequences (rows), K key and value heads, R query heads for each of them (N = K R), D
channels of a head, Q queries of a row, P groups of a piece.

The token at position t sees the groups before its own as they are stored, and its own group
unquantised, up to itself. A window of the level hides whole groups, except the first one; the
model's own sliding window hides single tokens. Positions decide that; no mask is read.

- **One new token of each row.** Scales are folded into the queries and zeros added to the scores,
  so that only codes have to be unpacked. Computed in float32; a running maximum and sum merge the
  pieces (Milakov and Gimelshein 2018).
- **Several new tokens.** Stored groups are widened piece by piece. Blocks of queries run against
  the keys that all of them see without a mask, and against the groups at the diagonal with one;
  parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch

from rap_env.models.caches.block_attention import BlockAttention
from rap_env.models.caches.cache_chunks import Chunk
from rap_env.models.caches.cache_codes import split
from rap_env.models.caches.token_attention import TokenAttention


def attend(
    query: torch.Tensor,
    chunk: Chunk,
    scaling: float | None,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of a chunk, (B, N, Q, D) -> (B, Q, N, D).

    Args:
        query: Queries of the chunk's columns.
        chunk: What the tokens see.
        scaling: Factor of the scores; by default ``D ** -0.5``.
        softcap: Scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        window: Tokens that the model's own attention sees, itself included, or None.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if chunk.token is not None:
        return TokenAttention(query, chunk.token, chunk.step, scale, softcap, window).attend()
    found = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for bundle in chunk.bundles:
        heads = bundle.keys.shape[1]
        mine = query if bundle.rows is None else query[bundle.rows]
        mine = split(mine[:, :, -bundle.new :], 1, heads, -1)
        output = BlockAttention(mine, bundle, chunk.level, scale, softcap, window).attend()
        output = output.flatten(1, 2).transpose(1, 2)
        if bundle.rows is None:
            found[:, -bundle.new :] = output
        else:
            found[bundle.rows, -bundle.new :] = output
    return found
