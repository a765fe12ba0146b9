"""What the search of a frontier measures next: pairs of counts that matter, masks that promise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rap_env.blocks import BlockMask
from rap_env.costs import request_costs
from rap_env.importance.frontier import Counts
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.scoring.predictor import Floats, LossPredictor, Removed, to_rows

_STARTS = 3  # masks that are improved for each pair of counts
_SWAPS = 3  # swaps in each: farther off, the predictor knows nothing
_TOP = 12  # of its favourites, until one is found that nobody measured


class Uses:
    """Which pairs of counts requests would use, if blocks of a kind cost their mean."""

    def __init__(self, memory: MemoryModel, requests: Sequence[Request]) -> None:
        layers = memory.facts.num_layers
        attn, ffn = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
        fitting = []
        for request in requests:
            costs = request_costs(memory, request.batch_size, request.seq_len_tokens)
            freed = np.array(costs.freed, dtype=np.float64)
            over = costs.dense_peak_bytes - request.budget_bytes
            fitting.append(attn * freed[::2].mean() + ffn * freed[1::2].mean() >= over)
        self._fitting = np.unique(np.array(fitting), axis=0)

    def pairs(self, expected: Floats, slack: float) -> set[Counts]:
        """Pairs that lose little more than the best one of some request.

        Args:
            expected: Expected loss of each pair, nats per token, (L + 1, L + 1).
            slack: How much more, as a share.
        """
        found: set[Counts] = set()
        for fits in self._fitting:
            losses = np.where(fits, expected, np.inf)
            if np.isfinite(losses.min()):
                good = losses <= (1 + slack) * max(float(losses.min()), 0.0) + 1e-9
                found |= {(int(a), int(f)) for a, f in np.argwhere(good)}
        return found


def propose(
    pair: Counts,
    best: Mapping[Counts, BlockMask],
    predictor: LossPredictor,
    measured: Collection[BlockMask],
) -> tuple[BlockMask, float] | None:
    """The mask with these counts that promises most and that nobody measured, if any.

    Args:
        pair: Attn and ffn blocks removed.
        best: The best known mask for each pair.
        predictor: Predicts losses.
        measured: Masks that need no proposal.

    Returns:
        The mask, and its predicted loss in nats per token.
    """
    blocks = len(predictor.alone)
    rows = to_rows(list(_starts(pair, best, blocks)), blocks)
    found: list[tuple[float, BlockMask]] = []
    for row in rows[np.argsort(predictor.losses(rows, guarded=False))[:_STARTS]]:
        for _ in range(_SWAPS):
            around = _swaps(row)
            losses = predictor.losses(around, guarded=False)
            order = np.argsort(losses)
            found += _unmeasured(around[order[:_TOP]], losses[order[:_TOP]], measured)
            row = around[order[0]]
    if not found:
        return None
    predicted, mask = min(found, key=lambda entry: entry[0])
    return mask, predicted


def _unmeasured(
    rows: Removed, losses: Floats, measured: Collection[BlockMask]
) -> list[tuple[float, BlockMask]]:
    """The first of some masks that nobody measured, with its predicted loss; or nothing."""
    for row, loss in zip(rows, losses, strict=True):
        mask = BlockMask.of(*np.flatnonzero(row).tolist())
        if mask not in measured:
            return [(float(loss), mask)]
    return []


def _starts(pair: Counts, best: Mapping[Counts, BlockMask], blocks: int) -> Iterator[BlockMask]:
    """The best known mask of the pair, and those of its neighbours made to have its counts."""
    attn, ffn = pair
    if pair in best:
        yield best[pair]
    for kind, fewer in ((0, (attn - 1, ffn)), (1, (attn, ffn - 1))):
        if fewer in best:
            for index in range(kind, blocks, 2):
                if index not in best[fewer]:
                    yield best[fewer] | BlockMask.of(index)
    for kind, more in ((0, (attn + 1, ffn)), (1, (attn, ffn + 1))):
        if more in best:
            for index in sorted(best[more].indices):
                if index % 2 == kind:
                    yield BlockMask(best[more].indices - {index})


def _swaps(row: npt.NDArray[np.bool_]) -> Removed:
    """The mask itself, and all with one removed block exchanged for a kept one of its kind."""
    places = np.arange(len(row))
    out, into = np.nonzero(row[:, None] & ~row & (places[:, None] % 2 == places % 2))
    rows = np.repeat(row[None], len(out) + 1, axis=0)
    rows[np.arange(1, len(out) + 1), out] = False
    rows[np.arange(1, len(out) + 1), into] = True
    return rows
