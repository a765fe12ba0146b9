from __future__ import annotations

import numpy as np
import pytest
import torch

from rap_env.blocks import BlockMask
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.score_table import TableScorer
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import ScoreStore
from tests.envs.conftest import make_context
from tests.scoring.tiny_table import all_masks, table_of
from tests.tiny import VOCAB_SIZE, tiny_llm

MASKS = [BlockMask(), BlockMask.of(1), BlockMask.of(0, 3), BlockMask.of(1, 2)]


@pytest.fixture
def scorer():
    ids = torch.randint(3, VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
    return MaskScorer(tiny_llm(), Corpus.of_tokens(ids))


def test_a_part_has_the_nll_of_its_windows(scorer):
    found = scorer.nll_on(MASKS, [0, 2])
    whole = [scorer.window_nll(mask)[[0, 2]].mean() for mask in MASKS]
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert found[0] != pytest.approx(scorer.nll(MASKS[0]))  # the other windows differ


def test_a_mask_on_a_part_counts_as_that_part(scorer):
    scorer.nll_on([*MASKS, MASKS[0]], [0])
    assert scorer.evaluations == 0
    assert scorer.passes == len(MASKS) / 4
    blocks = scorer.block_forwards
    assert 0 < blocks <= sum(4 - len(mask) for mask in MASKS) / 4
    assert 0 <= scorer.share_saved < 1
    scorer.nll_on(MASKS, [0])
    assert (scorer.passes, scorer.block_forwards) == (1, blocks)  # it is known by now
    scorer.nll(MASKS[1])
    assert scorer.passes == 2


def test_a_mask_known_on_the_whole_text_is_not_run_on_a_part(scorer):
    scorer.nll_many(MASKS)
    passes = scorer.passes
    found = scorer.nll_on(MASKS, [1, 3])
    assert found == [scorer.window_nll(mask)[[1, 3]].mean() for mask in MASKS]
    assert scorer.passes == passes == len(MASKS)


def test_nothing_of_a_part_is_stored(scorer, tmp_path):
    store = ScoreStore(tmp_path / "scores.sqlite")
    stored = MaskScorer(scorer.llm, scorer.corpus, store)
    stored.nll_on(MASKS, [0])
    assert len(store) == 0
    assert stored.known == 0


def test_a_table_has_one_part_the_whole_text():
    bench = make_context()
    scorer = TableScorer(table_of(bench, all_masks(6)))
    masks = [BlockMask.of(1), BlockMask.of(0, 3)]
    assert scorer.num_windows == 1
    assert scorer.nll_on(masks, [0]) == bench.scorer.nll_many(masks)
    assert scorer.passes == 0
