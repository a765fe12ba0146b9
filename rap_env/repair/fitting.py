"""Fits a library of stubs for any mask by reduced-rank ridge regression."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rap_env.errors import InvalidRequestError
from rap_env.models.families.placeholders import Stub, normalised
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.corpus import Corpus, ensure_disjoint

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Penalties to choose from for each block, as multiples of the mean variance."""

RANKS = (0, 8, 16, 32, 64, 96, 128, 192, 256)
"""Ranks to choose from for each block."""


class Moments:
    """Streamed sums over pairs (x, y) of width H: a normalised state, and a block's output for it.

    Memory does not depend on the number of tokens. `tokens` is the number of pairs added so far.
    """

    def __init__(self, hidden_size: int) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.tokens = 0
        self._x, self._y = zeros(hidden_size), zeros(hidden_size)
        self._xx, self._xy = zeros(hidden_size, hidden_size), zeros(hidden_size, hidden_size)
        self._yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch: normalised states, and what the block adds to the residual, both (N, H)."""
        x, y = x.float(), y.float()
        self.tokens += len(x)
        self._x += x.double().sum(dim=0).cpu()
        self._y += y.double().sum(dim=0).cpu()
        # Products of one batch are in float32 (twice as fast), their sum over batches in float64.
        self._xx += (x.T @ x).cpu()
        self._xy += (x.T @ y).cpu()
        self._yy += float(y.double().square().sum())

    @property
    def x_mean(self) -> torch.Tensor:
        """Mean of x, (H,)."""
        return self._x / self.tokens

    @property
    def y_mean(self) -> torch.Tensor:
        """Mean of y, (H,)."""
        return self._y / self.tokens

    @property
    def y_power(self) -> float:
        """Mean squared norm of y: the error of a map that is zero."""
        return self._yy / self.tokens

    def xx(self, x0: torch.Tensor) -> torch.Tensor:
        """Mean of ``(x - x0) (x - x0)'``, (H, H)."""
        mean = self.x_mean
        shift = torch.outer(mean, x0)
        return self._xx / self.tokens - shift - shift.T + torch.outer(x0, x0)

    def xy(self, x0: torch.Tensor, y0: torch.Tensor) -> torch.Tensor:
        """Mean of ``(x - x0) (y - y0)'``, (H, H)."""
        shift = torch.outer(self.x_mean, y0) + torch.outer(x0, self.y_mean)
        return self._xy / self.tokens - shift + torch.outer(x0, y0)

    def yy(self, y0: torch.Tensor) -> float:
        """Mean squared norm of ``y - y0``."""
        return self.y_power - 2 * float(self.y_mean @ y0) + float(y0 @ y0)


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """``y = (x - x_mean) @ inner[:, :r] @ basis[:, :r].T + y_mean`` for every rank r up to R.

    Attributes:
        inner: (H, R), the most useful column first.
        basis: Orthonormal columns, (H, R).
        x_mean: (H,).
        y_mean: (H,).
    """

    inner: torch.Tensor
    basis: torch.Tensor
    x_mean: torch.Tensor
    y_mean: torch.Tensor

    def errors(self, on: Moments) -> torch.Tensor:
        """Mean squared error of rank 0, 1, ... R on some tokens, (R + 1,).

        The columns of `basis` are orthonormal, so each explains its share independently.
        """
        xx, xy = on.xx(self.x_mean), on.xy(self.x_mean, self.y_mean)
        explained = 2 * (self.inner * (xy @ self.basis)).sum(dim=0)
        explained -= (self.inner * (xx @ self.inner)).sum(dim=0)
        return on.yy(self.y_mean) - torch.cat([explained.new_zeros(1), explained.cumsum(dim=0)])

    def tensors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tensors of a stub of that rank: down (r, H), up (H, r) and mean (H,), in float64.

        The columns of both factors have the same norm, so that one learning rate suits both when
        they are trained further.
        """
        inner, basis = self.inner[:, :rank], self.basis[:, :rank]
        mean = self.y_mean - basis @ (inner.T @ self.x_mean)
        scale = inner.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return (inner / scale).T.contiguous(), (basis * scale).contiguous(), mean


def reduced_rank_ridge(moments: Moments, ridge: float, rank: int) -> LowRankMap:
    """Fit the map of each rank up to `rank` with the least squared error plus ridge penalty.

    Ridge regression (Hoerl and Kennard 1970), then the leading eigenvectors of the explained part
    (reduced-rank regression, Izenman 1975): the optimum among all maps of rank r. `ridge` is the
    penalty as a multiple of the mean variance of x, above 0; `rank` is at most H.
    """
    x_mean, y_mean = moments.x_mean, moments.y_mean
    xx, xy = moments.xx(x_mean), moments.xy(x_mean, y_mean)
    # The tiny constant keeps the matrix regular if x does not vary.
    penalty = ridge * float(xx.diagonal().mean()) + torch.finfo(torch.float32).tiny
    xx.diagonal().add_(penalty)
    full = torch.linalg.solve(xx, xy)
    explained = xy.T @ full  # full' (xx + penalty) full
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    basis = vectors.flip(dims=(1,))[:, :rank]
    return LowRankMap(full @ basis, basis, x_mean, y_mean)


def allocate_ranks(
    errors: Mapping[int, Sequence[float]], choices: Sequence[int], total: int
) -> dict[int, int]:
    """Choose the rank of each block so that the sum of errors is small and that of ranks bounded.

    Every unit of rank takes the same bytes, so ranks measure bytes. Starting from the least
    rank, the step that reduces the error most per unit is taken first. With diminishing returns,
    as regressions have, the result is optimal for its sum up to the last step.

    Args:
        errors: For each block: the error at each of the `choices`.
        choices: Ranks to choose from, ascending.
        total: Greatest sum of the ranks.
    """
    place = dict.fromkeys(errors, 0)  # the number of each block's choice
    left = total - choices[0] * len(errors)

    def steps() -> Iterator[tuple[float, int, int]]:
        """The reduction per unit, block (negative) and choice of each step that still fits."""
        for block, curve in errors.items():
            at = place[block]
            for to in range(at + 1, len(choices)):
                cost = choices[to] - choices[at]
                if cost <= left and curve[to] < curve[at]:
                    yield (curve[at] - curve[to]) / cost, -block, to

    while best := max(steps(), default=None):
        block, to = -best[1], best[2]
        left -= choices[to] - choices[place[block]]
        place[block] = to
    return {block: choices[at] for block, at in place.items()}


_BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class BlockFit:
    """The fitted maps of one block.

    Attributes:
        block: Its index.
        map: The map of every rank, for the penalty that is best on the held-back tokens.
        ridge: That penalty.
        errors: Held-back error of rank 0, 1, ... relative to that of a map that is zero.
    """

    block: int
    map: LowRankMap
    ridge: float
    errors: torch.Tensor

    def stub(self, rank: int, dtype: torch.dtype) -> Stub:
        """The stub of a rank."""
        return Stub(*(tensor.to(dtype) for tensor in self.map.tensors(rank)))


def fit_library(
    llm: ElasticLLM,
    text: Corpus,
    held_back: Corpus,
    rank: int = 64,
    *,
    progress: bool = True,
) -> StubLibrary:
    """Fit a stub for each block to the block's output in the dense model.

    The text advances through the model one block at a time: memory holds its hidden states and the
    moments of one block only, and a streamed model reads each layer once. The ridge penalty and the
    rank of each block are chosen on the held-back tokens, which are of the same kind of text, but
    disjoint. Do not report results on either text.

    Args:
        llm: The live model; its mask is restored.
        text: Text to fit on.
        held_back: Text to choose penalties and ranks on.
        rank: Mean rank of the stubs: together they take at most as many bytes as stubs of it.
        progress: Whether to show progress.

    Raises:
        InvalidRequestError: The rank is below 0.
        CorpusError: The two texts overlap.
    """
    if rank < 0:
        raise InvalidRequestError(f"The mean rank of stubs must be 0 or above, not {rank}.")
    ensure_disjoint(text, held_back)
    began = time.perf_counter()
    partial = PartialForward(llm, widen=True)
    width = min(llm.facts.hidden_size, max(RANKS))
    bar = progress_bar(
        progress, total=llm.num_blocks, desc="fitting stubs", unit="block", leave=False
    )
    fits = []
    with bar, llm.masked(Plan()):
        states = [[partial.enter(ids) for ids in text_batches(t, llm)] for t in (text, held_back)]
        for step in partial.steps:
            sums = [_advance(partial, step, several) for several in states]
            for block in step:
                fit_on, judge_on = (moments[block] for moments in sums)
                if block not in llm.pruned.removed:  # which the model has lost already
                    fits.append(best_fit(block, fit_on, judge_on, min(rank, width), width))
                bar.update()
    choices = sorted({min(choice, width) for choice in RANKS})
    errors = {fit.block: [float(fit.errors[choice]) for choice in choices] for fit in fits}
    ranks = allocate_ranks(errors, choices, rank * len(fits))
    stubs = {fit.block: fit.stub(ranks[fit.block], llm.dtype) for fit in fits}
    made_by = {
        "rank": rank,
        "text": dict(text.provenance),
        "held_back": dict(held_back.provenance),
        "seconds": time.perf_counter() - began,
        "method": "ridge regression on the dense model's states",
        "ridge": [fit.ridge for fit in fits],
        "held_back_errors": [float(fit.errors[ranks[fit.block]]) for fit in fits],
    }
    return StubLibrary(llm.name, llm.fingerprint, stubs, made_by)


def text_batches(text: Corpus, llm: ElasticLLM) -> Sequence[torch.Tensor]:
    """The windows of a text on the model's device, in batches of shape (rows, T)."""
    tokens = text.tokens.to(llm.device)
    return torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1]))


def _advance(
    partial: PartialForward, step: tuple[int, ...], states: list[torch.Tensor]
) -> dict[int, Moments]:
    """Moments of each block of a step; replaces `states` by the step's outputs."""
    hidden_size = states[0].shape[-1]
    sums = {block: Moments(hidden_size) for block in step}
    for number, state in enumerate(states):
        x = normalised(state.float()).view(-1, hidden_size)
        for block in step:
            after = partial.run((block,), state)
            sums[block].add(x, (after.float() - state.float()).view(-1, hidden_size))
        states[number] = after if len(step) == 1 else partial.run(step, state)
    return sums


def best_fit(block: int, fit_on: Moments, judge_on: Moments, rank: int, width: int) -> BlockFit:
    """Fit maps up to rank `width` with the penalty of least held-back error at `rank`."""
    fits = []
    for ridge in RIDGES:
        candidate = reduced_rank_ridge(fit_on, ridge, width)
        # The output may be zero, as for a block that a pruned model has lost.
        power = max(judge_on.y_power, torch.finfo(torch.float32).tiny)
        errors = candidate.errors(judge_on) / power
        fits.append(BlockFit(block, candidate, ridge, errors))
    return min(fits, key=lambda fit: float(fit.errors[rank]))
