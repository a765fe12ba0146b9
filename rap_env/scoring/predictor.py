"""The loss of masks that nobody measured, from those that somebody did. Numpy alone, no model.

The logarithm of the loss is fitted by ridge regression. What the single removals cost together
gives its level: losses about add up, and level off where the text is guessed at. One weight a
block and one a pair of blocks say how blocks make each other worse or better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.scoring.fidelity import Fidelity

Removed = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

REACHES = (4, 12, 60)
"""Greatest distances, in blocks, of pairs that have a weight; one is chosen."""

RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Penalties on the squared weights; one is chosen."""

LEAST_SHARE = 0.5
"""A mask is taken to lose at least this share of what its worst block alone loses. Of 4,900
measured masks of the default model every one that lost over 0.1 nats alone lost 0.67 or more."""

_CHUNK = 2048
_EVIDENCE = 20  # masks with so many removals or more, for a bound to be drawn from them
_MOST_PAIRS = 2000  # deep models have more; farther ones are left out
_COUNT_SCALE = 20.0  # brings squared counts of blocks near the other inputs
_SPLIT = (0.8, 0.1, 0.1)  # masks to fit, to choose the settings, to state the fidelity
_MOST_LOG = 50.0


@dataclass(frozen=True, eq=False)
class LossPredictor:
    """Predicts losses in nats per token. Deterministic, and the same alone or among others.

    With r the removed blocks, a and f how many of them are attention and feed-forward, and
    s the sum of what they lose alone: ``log(loss + offset) = intercept + linear[r] + pairs[r, r]
    + shape . (log(s + offset), its square, a², f², a f)``.

    What it gives stays between guards. A mask is never predicted to be better than the best
    measured one with as many removals or more, nor than `LEAST_SHARE` of what its worst block
    loses alone; so nobody wins by finding where the predictor is wrong. It is never predicted
    to be worse than the worst one measured. Where few masks were measured (many removals) it
    says little more than that.

    Attributes:
        alone: Loss without each block alone, nats per token, (2L,).
        offset: Losses well below it are told apart no more, nats per token.
        reach: Greatest distance of a pair that has a weight, in blocks.
        ridge: The penalty it was fitted with.
        intercept: As above.
        linear: Weight of each block, (2L,).
        pairs: Weight of each pair within reach, in the order of `pair_indices`.
        shape: Weights of the five terms above.
        least: Least loss measured with 0 ... 2L removals or more, nats per token, (2L + 1,).
        most: Greatest loss measured, nats per token.
    """

    alone: tuple[float, ...]
    offset: float
    reach: int
    ridge: float
    intercept: float
    linear: tuple[float, ...]
    pairs: tuple[float, ...]
    shape: tuple[float, ...]
    least: tuple[float, ...]
    most: float

    def loss(self, removed: Collection[int]) -> float:
        """The predicted loss without some blocks, nats per token.

        Args:
            removed: Their indices.
        """
        if not removed:
            return 0.0
        index = np.array(sorted(removed))  # sorted: sums of floats depend on their order
        alone = self._alone[index]
        ffn = int((index % 2).sum())
        terms = _shape(float(np.maximum(alone, 0).sum()), len(index) - ffn, ffn, self.offset)
        log_loss = self.intercept + float(self._linear[index].sum())
        log_loss += float(self._pairs[index[:, None], index].sum())
        log_loss += sum(w * float(term) for w, term in zip(self.shape, terms, strict=True))
        least = max(self.least[len(index)], LEAST_SHARE * float(alone.max()))
        return min(max(math.exp(min(log_loss, _MOST_LOG)) - self.offset, least), self.most)

    def losses(self, removed: Removed, *, guarded: bool = True) -> Floats:
        """The predicted losses of many masks at once, as `loss` gives them but for rounding.

        Args:
            removed: True for each removed block of each mask, (N, 2L).
            guarded: Keep them between the guards; a search that measures what it proposes needs
                to tell masks apart beyond them.

        Returns:
            Nats per token, (N,).
        """
        x = removed.astype(np.float64)
        counts, ffn = removed.sum(axis=1), x[:, 1::2].sum(axis=1)
        terms = _shape(x @ np.maximum(self._alone, 0), counts - ffn, ffn, self.offset)
        log_loss = self.intercept + x @ self._linear + ((x @ self._pairs) * x).sum(axis=1)
        log_loss += sum(weight * term for weight, term in zip(self.shape, terms, strict=True))
        found = np.exp(np.minimum(log_loss, _MOST_LOG)) - self.offset
        if not guarded:
            return np.where(counts > 0, found, 0.0)
        worst = np.where(removed, self._alone, -np.inf).max(axis=1, initial=-np.inf)
        least = np.maximum(np.array(self.least)[counts], LEAST_SHARE * worst)
        return np.where(counts > 0, np.minimum(np.maximum(found, least), self.most), 0.0)

    @cached_property
    def _alone(self) -> Floats:
        return np.array(self.alone)

    @cached_property
    def _linear(self) -> Floats:
        return np.array(self.linear)

    @cached_property
    def _pairs(self) -> Floats:
        """Weights of pairs as a matrix, each pair once, (2L, 2L)."""
        matrix = np.zeros((len(self.alone), len(self.alone)))
        matrix[pair_indices(len(self.alone), self.reach)] = self.pairs
        return matrix


def fit_predictor(
    removed: Removed, losses: Floats, alone: Floats, *, seed: int = 0
) -> tuple[LossPredictor, Fidelity]:
    """Fit a predictor to measured masks, and find out how good it is on others.

    A tenth of the masks is held out and judged on; another tenth chooses reach and ridge. The
    predictor that is returned is then fitted to all of them, so that it is no worse.

    Args:
        removed: True for each removed block of each mask, (N, 2L).
        losses: Their losses, nats per token, (N,).
        alone: Loss without each block alone, nats per token, (2L,).
        seed: Decides which masks are held out.

    Returns:
        The predictor, and the fidelity of one that never saw the held-out masks.
    """
    order = np.random.default_rng(seed).permutation(len(losses))
    ends = np.round(np.cumsum(_SPLIT[:2]) * len(losses)).astype(int)
    to_fit, to_choose, held_out = np.split(order, ends)
    fit = Fit(removed, losses, alone, [to_fit, to_choose, held_out])
    candidates = [(reach, ridge) for reach in fit.reaches for ridge in RIDGES]
    best = min(candidates, key=lambda c: fit.error(fit.solved([0], *c), to_choose))
    judged = fit.solved([0, 1], *best)
    predicted = judged.losses(removed[held_out])
    fidelity = Fidelity.of(
        predicted, losses[held_out], removed[held_out].sum(axis=1), removed.shape[1],
        fitted=len(to_fit) + len(to_choose),
    )  # fmt: skip
    return fit.solved([0, 1, 2], *best), fidelity


class Fit:
    """Sums over parts of the data from which any candidate is solved."""

    def __init__(
        self,
        removed: Removed,
        losses: Floats,
        alone: Floats,
        parts: list[npt.NDArray[np.int64]],
        reaches: Sequence[int] = REACHES,
    ) -> None:
        self.removed, self.losses, self.alone, self.parts = removed, losses, alone, parts
        self.offset = max(1e-6, float(np.median(np.abs(alone))) / 2)
        self.targets = np.log(np.maximum(losses, -self.offset / 2) + self.offset)
        sizes = {reach: len(pair_indices(len(alone), reach)[0]) for reach in reaches}
        self.reaches = [r for r in reaches if sizes[r] <= _MOST_PAIRS] or [min(reaches)]
        self._pairs = pair_indices(len(alone), self.reaches[-1])
        self._sums = [self._moments(part) for part in parts]

    def solved(self, parts: list[int], reach: int, ridge: float) -> LossPredictor:
        """The predictor fitted to some of the parts."""
        blocks = len(self.alone)
        pairs = np.flatnonzero(self._pairs[1] - self._pairs[0] <= reach)
        width = len(self._sums[0])
        used = np.concatenate([np.arange(blocks), blocks + pairs, np.arange(width - 7, width - 1)])
        sums = sum(self._sums[part] for part in parts)
        assert isinstance(sums, np.ndarray)
        penalty = np.full(len(used), ridge)
        penalty[-1] = 1e-9  # the intercept is free
        weights = np.linalg.solve(sums[np.ix_(used, used)] + np.diag(penalty), sums[used, -1])
        seen = np.concatenate([self.parts[part] for part in parts])
        return LossPredictor(
            alone=tuple(self.alone.tolist()),
            offset=self.offset,
            reach=reach,
            ridge=ridge,
            intercept=float(weights[-1]),
            linear=tuple(weights[:blocks].tolist()),
            pairs=tuple(weights[blocks:-6].tolist()),
            shape=tuple(weights[-6:-1].tolist()),
            least=_least_by_count(self.removed[seen].sum(axis=1), self.losses[seen], blocks),
            most=float(max(self.losses[seen].max(), self.alone.max())),
        )

    def error(self, predictor: LossPredictor, part: npt.NDArray[np.int64]) -> float:
        """Root mean squared error of log(loss + offset)."""
        found = predictor.losses(self.removed[part])
        logs = np.log(np.maximum(found, -self.offset / 2) + self.offset)
        return float(np.sqrt(np.mean((logs - self.targets[part]) ** 2)))

    def _moments(self, part: npt.NDArray[np.int64]) -> Floats:
        """Products of all inputs (blocks, pairs, shape, 1) and the target, summed over masks."""
        rows, columns = self._pairs
        width = len(self.alone) + len(rows) + 7
        total = np.zeros((width, width))
        for start in range(0, len(part), _CHUNK):
            chosen = part[start : start + _CHUNK]
            x = self.removed[chosen].astype(np.float64)
            together = x @ np.maximum(self.alone, 0)
            shape = _shape(together, x[:, ::2].sum(axis=1), x[:, 1::2].sum(axis=1), self.offset)
            ones, target = np.ones(len(x)), self.targets[chosen]
            table = np.column_stack([x, x[:, rows] * x[:, columns], *shape, ones, target])
            total += table.T @ table
        return total


def to_rows(masks: Sequence[Iterable[int]], num_blocks: int) -> Removed:
    """True for each removed block of each mask, given by indices, (N, 2L)."""
    rows = np.zeros((len(masks), num_blocks), dtype=bool)
    for row, mask in zip(rows, masks, strict=True):
        row[list(mask)] = True
    return rows


def pair_indices(
    num_blocks: int, reach: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Both blocks of every pair, the first before the second, at most `reach` apart."""
    rows, columns = np.triu_indices(num_blocks, 1)
    near = columns - rows <= reach
    return rows[near], columns[near]


def _shape(together: Any, attn: Any, ffn: Any, offset: float) -> tuple[Any, ...]:
    """What a mask is like on the whole, as five numbers (or arrays) of about the same size."""
    level = np.log(together + offset)
    counts = (attn * attn / _COUNT_SCALE, ffn * ffn / _COUNT_SCALE, attn * ffn / _COUNT_SCALE)
    return (level, 0.3 * level * level, *counts)


def _least_by_count(
    counts: npt.NDArray[np.int64], losses: Floats, blocks: int
) -> tuple[float, ...]:
    """For 0 ... 2L removals: the least loss of a mask with so many or more.

    Where fewer than `_EVIDENCE` masks have so many, the last number that has them decides.
    """
    deepest = np.sort(counts)[-min(_EVIDENCE, len(counts))]
    least = np.full(blocks + 1, np.inf)
    np.minimum.at(least, np.minimum(counts, deepest), losses)
    least[deepest:] = least[deepest]
    return tuple(np.minimum.accumulate(least[::-1])[::-1].tolist())
