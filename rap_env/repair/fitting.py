"""Fits stubs by regression: a library for any mask, or the stubs of a single mask."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rap_env.models.families.placeholders import Stub, normalised
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.repair.config import FitConfig
from rap_env.repair.regression import LowRankMap, Moments, allocate_ranks, reduced_rank_ridge
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.corpus import Corpus, ensure_disjoint

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
    config: FitConfig = FitConfig(),
    *,
    progress: bool = True,
) -> StubLibrary:
    """Fit a stub for each block to the block's output in the dense model.

    The text advances through the model one block at a time: memory holds its hidden states and the
    moments of one block only, and a streamed model reads each layer once. The ridge penalty and the
    rank of each block are chosen on the held-back tokens, which are of the same kind of text, but
    disjoint. Do not report results on either text.

    Raises:
        CorpusError: The two texts overlap.
    """
    ensure_disjoint(text, held_back)
    began = time.perf_counter()
    fits = [
        fit
        for fit in block_fits(llm, text, held_back, config, progress=progress)
        if fit.block not in llm.pruned.removed  # the model has already lost it
    ]
    ranks = _ranks(fits, config)
    stubs = {fit.block: fit.stub(ranks[fit.block], llm.dtype) for fit in fits}
    made_by = {
        **_made_by(text, held_back, config, began),
        "method": "ridge regression on the dense model's states",
        "ridge": [fit.ridge for fit in fits],
        "held_back_errors": [float(fit.errors[ranks[fit.block]]) for fit in fits],
    }
    return StubLibrary(llm.name, llm.fingerprint, stubs, made_by)


def _made_by(text: Corpus, held_back: Corpus, config: FitConfig, began: float) -> dict[str, Any]:
    return {
        "settings": asdict(config),
        "text": dict(text.provenance),
        "held_back": dict(held_back.provenance),
        "seconds": time.perf_counter() - began,
    }


def block_fits(
    llm: ElasticLLM, text: Corpus, held_back: Corpus, config: FitConfig, *, progress: bool = True
) -> Iterator[BlockFit]:
    """The fitted maps of each block, in order of index."""
    partial = PartialForward(llm, widen=True)
    width = min(llm.facts.hidden_size, max(config.ranks or (config.rank,)))
    bar = progress_bar(
        progress, total=llm.num_blocks, desc="fitting stubs", unit="block", leave=False
    )
    with bar, llm.masked(Plan()):
        states = [[partial.enter(ids) for ids in text_batches(t, llm)] for t in (text, held_back)]
        for step in partial.steps:
            sums = [_advance(partial, step, several) for several in states]
            for block in step:
                fit_on, judge_on = (moments[block] for moments in sums)
                yield best_fit(block, fit_on, judge_on, config, width)
                bar.update()


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
    for number, entering in enumerate(states):
        state = partial.entering(step, entering)
        x = normalised(state.float()).view(-1, hidden_size)
        for block in step:
            after = partial.run((block,), state)
            sums[block].add(x, (after.float() - state.float()).view(-1, hidden_size))
        states[number] = after if len(step) == 1 else partial.run(step, state)
    return sums


def best_fit(
    block: int, fit_on: Moments, judge_on: Moments, config: FitConfig, width: int
) -> BlockFit:
    """Fit maps up to rank `width` with the penalty of least held-back error at the mean rank."""
    found = []
    for ridge in config.ridges:
        candidate = reduced_rank_ridge(fit_on, ridge, width)
        # The output may be zero, as for a block that a pruned model has lost.
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
    errors = {fit.block: [float(fit.errors[rank]) for rank in choices] for fit in fits}
    return allocate_ranks(errors, choices, config.rank * len(fits))


def fit_for_mask(
    llm: ElasticLLM,
    mask: Plan,
    text: Corpus,
    held_back: Corpus,
    config: FitConfig = FitConfig(),
    *,
    ranks: Mapping[int, int] | None = None,
) -> StubLibrary:
    """Fit the stubs of one mask, each on the states that result from the stubs before it.

    A stub's target is the dense model's state after the block, so it also corrects errors of
    earlier blocks. The library has stubs for the blocks of this mask only; a shared library is
    compared with it. The ridge penalty is chosen on the held-back tokens. `ranks` has the rank of
    each stub by index of its block, such as a library's, for equal bytes; None gives every stub
    the rank of `config`.

    Raises:
        CorpusError: The two texts overlap.
        UnknownNameError: The mask names blocks that the model does not have.
    """
    ensure_disjoint(text, held_back)
    mask.check(llm.num_blocks)
    began = time.perf_counter()
    stubs: dict[int, Stub] = {}
    partial = PartialForward(llm, widen=True)
    with llm.masked(Plan()):
        tracks = [_Track(partial, text_batches(t, llm)) for t in (text, held_back)]
        for step in partial.steps:
            kept = tuple(block for block in step if block not in mask.removed)
            for track in tracks:
                track.advance(step, kept)
            for block in (block for block in step if block in mask.removed):
                fit_on, judge_on = (track.moments() for track in tracks)
                rank = config.rank if ranks is None else ranks[block]
                fit = best_fit(block, fit_on, judge_on, replace(config, rank=rank), rank)
                stubs[block] = fit.stub(rank, llm.dtype)
                for track in tracks:
                    track.add(stubs[block].on(llm.device_of(block)))
    made_by = {
        **_made_by(text, held_back, config, began),
        "method": "ridge regression for one mask, towards the dense model's states",
        "mask": list(mask.removed_names),
    }
    return StubLibrary(llm.name, llm.fingerprint, stubs, made_by)


class _Track:
    """Hidden states of a text in the dense model and in the masked one."""

    def __init__(self, partial: PartialForward, batches: Sequence[torch.Tensor]) -> None:
        self._partial = partial
        self._dense = [partial.enter(ids) for ids in batches]
        self._masked = list(self._dense)
        self._entered = list(self._dense)

    def advance(self, step: tuple[int, ...], kept: tuple[int, ...]) -> None:
        """Run a step of both models; the masked model runs the kept blocks only."""
        self._entered = [self._partial.entering(step, state) for state in self._masked]
        self._dense = [self._partial.run(step, state) for state in self._dense]
        self._masked = [self._partial.run(kept, s) if kept else s for s in self._entered]

    def moments(self) -> Moments:
        """Moments of the masked step's input and of the difference to the dense output."""
        sums = Moments(self._entered[0].shape[-1])
        for entered, dense, masked in zip(self._entered, self._dense, self._masked, strict=True):
            missing = dense.float() - masked.float()
            sums.add(normalised(entered.float()).flatten(end_dim=1), missing.flatten(end_dim=1))
        return sums

    @torch.inference_mode()
    def add(self, stub: Stub) -> None:
        """Add a stub's output to the masked step."""
        pairs = zip(self._entered, self._masked, strict=True)
        self._masked = [masked + stub(entered) for entered, masked in pairs]
