"""Stubs for one mask: each takes back what was lost before it."""

import pytest
import torch

from rap_env.blocks import BlockMask
from rap_env.errors import CorpusError, UnknownNameError
from rap_env.repair import FitConfig, fit_for_mask, fit_library
from tests.llm.test_elastic import MASKS, weights_hash
from tests.repair.texts import random_text, state_error
from tests.tiny import FAMILIES, tiny_llm

TEXT, HELD_BACK = random_text(0, 60), random_text(1, 20)
CONFIG = FitConfig(rank=4, ridges=(1e-6, 1e-2), ranks=None)
MASK = BlockMask.of(0, 1, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_has_stubs_for_the_mask_alone_and_they_help(name: str, dtype) -> None:
    llm = tiny_llm(name, layers=3, dtype=dtype)
    weights = weights_hash(llm.model)
    library = fit_for_mask(llm, MASK, TEXT, HELD_BACK, CONFIG)
    assert library.stubs.keys() == set(MASK)
    assert set(library.ranks.values()) == {4}
    assert all(stub.mean.dtype == dtype for stub in library.stubs.values())
    assert library.provenance["mask"] == list(MASK.names)
    view = library.attach(llm)
    assert state_error(view, TEXT, MASK) < state_error(llm, TEXT, MASK)
    assert weights_hash(llm.model) == weights


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "opt"])
def test_it_is_nearer_to_the_dense_model_than_stubs_for_any_mask(name: str) -> None:
    llm = tiny_llm(name, layers=3)
    shared = fit_library(llm, TEXT, HELD_BACK, CONFIG, progress=False).attach(llm)
    own = fit_for_mask(llm, MASK, TEXT, HELD_BACK, CONFIG).attach(llm)
    assert state_error(own, TEXT, MASK) < state_error(shared, TEXT, MASK)


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_where_nothing_was_lost_before_it_is_the_stub_of_the_library(block: int) -> None:
    llm = tiny_llm()
    shared = fit_library(llm, TEXT, HELD_BACK, CONFIG, progress=False).stubs[block]
    own = fit_for_mask(llm, BlockMask.of(block), TEXT, HELD_BACK, CONFIG).stubs[block]
    for ours, theirs in zip(own.parameters(), shared.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_can_be_those_of_another_library() -> None:
    llm, wanted = tiny_llm(), {0: 0, 1: 2, 3: 16}
    library = fit_for_mask(llm, BlockMask.of(*wanted), TEXT, HELD_BACK, CONFIG, ranks=wanted)
    assert {index: stub.rank for index, stub in library.stubs.items()} == wanted


def test_the_mask_in_force_does_not_matter_and_stays() -> None:
    llm = tiny_llm()
    mask = BlockMask.of(0, 3)
    expected = fit_for_mask(llm, mask, TEXT, HELD_BACK, CONFIG).sha256
    with llm.masked(MASKS["everything"]):
        assert fit_for_mask(llm, mask, TEXT, HELD_BACK, CONFIG).sha256 == expected
        assert llm.mask == MASKS["everything"]


def test_without_blocks_there_are_no_stubs() -> None:
    assert fit_for_mask(tiny_llm(), BlockMask(), TEXT, HELD_BACK, CONFIG).stubs == {}


def test_overlapping_texts_and_unknown_blocks_are_refused() -> None:
    with pytest.raises(CorpusError, match="share 12 tokens in a row"):
        fit_for_mask(tiny_llm(), MASKS["all ffn"], TEXT, TEXT, CONFIG)
    with pytest.raises(UnknownNameError, match="layer09"):
        fit_for_mask(tiny_llm(), BlockMask.of("layer09.ffn"), TEXT, HELD_BACK, CONFIG)
