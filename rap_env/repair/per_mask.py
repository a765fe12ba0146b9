"""Stubs for one mask alone: what a shared library is compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from rap_env.blocks import BlockMask
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.llm.placeholders import Stub, normalised
from rap_env.repair.fitting import FitConfig, best_fit, text_batches
from rap_env.repair.library import StubLibrary
from rap_env.repair.moments import Moments
from rap_env.scoring.corpus import Corpus, ensure_disjoint


def fit_for_mask(
    llm: ElasticLLM,
    mask: BlockMask,
    text: Corpus,
    held_back: Corpus,
    config: FitConfig = FitConfig(),
    *,
    ranks: Mapping[int, int] | None = None,
) -> StubLibrary:
    """Fit the stubs of one mask, each on the states that the stubs before it lead to.

    A stub's target is the dense model's state after the block, so it also takes back what was lost
    before it. It serves this mask alone, and has to be fitted anew for each.

    Args:
        llm: The live model; its mask is restored.
        mask: The blocks to remove.
        text: Tokens to fit on; nothing may be reported on them.
        held_back: Tokens on which the ridge penalty is chosen.
        config: Rank and penalties.
        ranks: Rank of each stub by index of the block, such as a library's, for equal bytes; None
            gives each that of `config`.

    Returns:
        A library with stubs for the blocks of `mask` alone.

    Raises:
        CorpusError: The two texts overlap.
        UnknownNameError: The mask names blocks that the model does not have.
    """
    ensure_disjoint(text, held_back)
    mask.check(llm.num_blocks)
    began = time.perf_counter()
    stubs: dict[int, Stub] = {}
    partial = PartialForward(llm)
    with llm.masked(BlockMask()):
        tracks = [_Track(partial, text_batches(t, llm)) for t in (text, held_back)]
        for step in partial.steps:
            kept = tuple(block for block in step if block not in mask)
            for track in tracks:
                track.advance(step, kept)
            for block in (block for block in step if block in mask):
                fit_on, judge_on = (track.moments() for track in tracks)
                rank = config.rank if ranks is None else ranks[block]
                fit = best_fit(block, fit_on, judge_on, replace(config, rank=rank), rank)
                stubs[block] = fit.stub(rank, llm.dtype)
                for track in tracks:
                    track.add(stubs[block].on(llm.device))
    provenance = {
        "method": "ridge regression for one mask, towards the dense model's states",
        "mask": list(mask.names),
        "settings": asdict(config),
        "text": dict(text.provenance),
        "held_back": dict(held_back.provenance),
        "seconds": time.perf_counter() - began,
    }
    return StubLibrary(llm.name, llm.fingerprint, stubs, provenance)


class _Track:
    """A text on its way through the dense model and the masked one, side by side."""

    def __init__(self, partial: PartialForward, batches: Sequence[torch.Tensor]) -> None:
        self._partial = partial
        self._dense = [partial.enter(ids) for ids in batches]
        self._masked = list(self._dense)
        self._entered = list(self._dense)

    def advance(self, step: tuple[int, ...], kept: tuple[int, ...]) -> None:
        """Take both over a step; of the masked model, the kept blocks alone are run."""
        self._entered = list(self._masked)
        self._dense = [self._partial.run(step, state) for state in self._dense]
        self._masked = [self._partial.run(kept, s) if kept else s for s in self._masked]

    def moments(self) -> Moments:
        """What entered the masked step, and what its state lacks to the dense one."""
        sums = Moments(self._entered[0].shape[-1])
        for entered, dense, masked in zip(self._entered, self._dense, self._masked, strict=True):
            lacking = dense.float() - masked.float()
            sums.add(normalised(entered.float()).flatten(end_dim=1), lacking.flatten(end_dim=1))
        return sums

    @torch.inference_mode()
    def add(self, stub: Stub) -> None:
        """Let a stub stand in the masked step."""
        pairs = zip(self._entered, self._masked, strict=True)
        self._masked = [masked + stub(entered) for entered, masked in pairs]
