"""A stub library from the dense model's states: fitted once, valid for any mask."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.llm.placeholders import Stub, normalised
from rap_env.repair.library import StubLibrary
from rap_env.repair.moments import Moments
from rap_env.repair.ranks import allocate
from rap_env.repair.regression import LowRankMap, reduced_rank_ridge
from rap_env.scoring.corpus import Corpus, ensure_disjoint

_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class FitConfig:
    """How stubs are fitted.

    Attributes:
        rank: Mean rank of the stubs: together they take the bytes that stubs of this rank would.
        ridges: Penalties to choose from for each block, as multiples of the mean variance.
        ranks: Ranks to choose from for each block; None gives every block `rank`.

    Raises:
        InvalidRequestError: A number is out of its range.
    """

    rank: int = 64
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    ranks: tuple[int, ...] | None = (0, 8, 16, 32, 64, 96, 128, 192, 256)

    def __post_init__(self) -> None:
        if self.rank < 0 or min(self.ranks or (0,)) < 0:
            raise InvalidRequestError(f"Ranks of stubs must be 0 or above, not {self}.")
        if self.ranks is not None and min(self.ranks, default=self.rank + 1) > self.rank:
            raise InvalidRequestError(
                f"No rank of {self.ranks} is within the mean rank of {self.rank}; offer a lower "
                "one, or None for the same rank everywhere."
            )
        if not self.ridges or min(self.ridges) <= 0:
            raise InvalidRequestError(f"Ridge penalties must be above 0, not {self.ridges}.")


@dataclass(frozen=True, eq=False)
class BlockFit:
    """The fitted maps of one block.

    Attributes:
        block: Its index.
        map: For every rank; of the penalty that did best on the held-back tokens.
        ridge: That penalty.
        errors: Held-back error of rank 0, 1, ... as a share of that of adding nothing.
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
    config: FitConfig = FitConfig(),
    *,
    progress: bool = True,
) -> StubLibrary:
    """Fit a stub for each block to what the block adds in the dense model.

    The text advances through the model a block at a time: beside its hidden states, the sums of
    one block alone are in memory, and a streamed model reads each layer once. The ridge penalty
    and the rank of each block are chosen on the held-back tokens.

    Args:
        llm: The live model; its mask is restored.
        text: Tokens to fit on; nothing may be reported on them.
        held_back: Tokens to choose on; of the same kind of text, but none of it.
        config: Ranks and penalties.
        progress: Whether to draw a progress bar.

    Raises:
        CorpusError: The two texts overlap.
    """
    ensure_disjoint(text, held_back)
    began = time.perf_counter()
    fits = [
        fit
        for fit in block_fits(llm, text, held_back, config, progress=progress)
        if fit.block not in llm.pruned  # nothing is left to remove
    ]
    ranks = _ranks(fits, config)
    stubs = {fit.block: fit.stub(ranks[fit.block], llm.dtype) for fit in fits}
    provenance = {
        "method": "ridge regression on the dense model's states",
        "settings": asdict(config),
        "text": dict(text.provenance),
        "held_back": dict(held_back.provenance),
        "ridge": [fit.ridge for fit in fits],
        "held_back_errors": [float(fit.errors[ranks[fit.block]]) for fit in fits],
        "seconds": time.perf_counter() - began,
    }
    return StubLibrary(llm.name, llm.fingerprint, stubs, provenance)


def block_fits(
    llm: ElasticLLM, text: Corpus, held_back: Corpus, config: FitConfig, *, progress: bool = True
) -> Iterator[BlockFit]:
    """The fitted maps of each block, in order of index."""
    partial = PartialForward(llm)
    width = min(llm.facts.hidden_size, max(config.ranks or (config.rank,)))
    bar = tqdm(
        total=llm.num_blocks, desc="fitting stubs", unit="block", leave=False,
        disable=None if progress else True,
    )  # fmt: skip
    with bar, llm.masked(BlockMask()):
        states = [[partial.enter(ids) for ids in text_batches(t, llm)] for t in (text, held_back)]
        for step in partial.steps:
            sums = [_advance(partial, step, several) for several in states]
            for block in step:
                fit_on, judge_on = (moments[block] for moments in sums)
                yield best_fit(block, fit_on, judge_on, config, width)
                bar.update()


def text_batches(text: Corpus, llm: ElasticLLM) -> Sequence[torch.Tensor]:
    """The windows of a text on the model's device, a few at a time, each (rows, T)."""
    tokens = text.tokens.to(llm.device)
    return torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1]))


def _advance(
    partial: PartialForward, step: tuple[int, ...], states: list[torch.Tensor]
) -> dict[int, Moments]:
    """Sum up what each block of a step adds; `states` become what leaves the step."""
    hidden_size = states[0].shape[-1]
    sums = {block: Moments(hidden_size) for block in step}
    for number, state in enumerate(states):
        x = normalised(state.float()).view(-1, hidden_size)
        for block in step:
            after = partial.run((block,), state)
            sums[block].add(x, (after.float() - state.float()).view(-1, hidden_size))
        states[number] = after if len(step) == 1 else partial.run(step, state)
    return sums


def best_fit(
    block: int, fit_on: Moments, judge_on: Moments, config: FitConfig, width: int
) -> BlockFit:
    """The maps of a block, of the penalty that has the least held-back error at the mean rank.

    Args:
        block: Its index.
        fit_on: Sums over the tokens to fit on.
        judge_on: Sums over the held-back tokens.
        config: Mean rank and penalties.
        width: The highest rank that is wanted.
    """
    found = []
    for ridge in config.ridges:
        candidate = reduced_rank_ridge(fit_on, ridge, width)
        # What a block adds may be nothing at all, as where a pruned model has lost it.
        power = max(judge_on.y_power, torch.finfo(torch.float32).tiny)
        errors = candidate.errors(judge_on) / power
        found.append(BlockFit(block, candidate, ridge, errors))
    return min(found, key=lambda fit: float(fit.errors[min(config.rank, width)]))


def _ranks(fits: Sequence[BlockFit], config: FitConfig) -> dict[int, int]:
    """The rank of each block."""
    width = fits[0].map.basis.shape[1]
    if config.ranks is None:
        return {fit.block: min(config.rank, width) for fit in fits}
    choices = sorted({min(rank, width) for rank in config.ranks})
    losses = {fit.block: [float(fit.errors[rank]) for rank in choices] for fit in fits}
    return allocate(losses, choices, config.rank * len(fits))
