"""Scores of masks with stubs: shared without changing a bit, and kept apart from those without."""

import torch

from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import ScoreStore, context_key
from tests.models.stubs import random_stubs, repaired
from tests.scoring.test_scorer import MASKS, tokens
from tests.tiny import tiny_llm


def test_a_stub_is_not_counted_as_a_block():
    llm, ids = tiny_llm(), tokens()
    ours, plain = MaskScorer(repaired(llm), ids), MaskScorer(llm, ids)
    for scorer in (ours, plain):
        scorer.nll_many(MASKS)
    assert ours.block_forwards == plain.block_forwards
    assert ours.full_block_forwards == plain.full_block_forwards


# The store


def libraries(llm):
    """Two libraries that differ in one number."""
    first, second = random_stubs(llm), random_stubs(llm)
    with torch.no_grad():
        second[3].mean[5] += 1e-6
    return [StubLibrary(llm.name, llm.fingerprint, stubs) for stubs in (first, second)]


def test_the_context_depends_on_stubs_only_if_there_are_any():
    llm, ids = tiny_llm(), tokens()
    plain = MaskScorer(llm, ids).context
    assert "repair" not in plain
    one, two = (MaskScorer(library.attach(llm), ids).context for library in libraries(llm))
    assert len({context_key(context) for context in (plain, one, two)}) == 3
    assert {k: v for k, v in one.items() if k != "repair"} == plain
    assert one["repair"] == libraries(llm)[0].sha256
    # Stubs given twice are the same stubs.
    assert MaskScorer(libraries(llm)[0].attach(llm), ids).context == one
    assert MaskScorer(llm, ids).context == plain


def test_one_store_keeps_both(tmp_path):
    llm, ids = tiny_llm(), tokens()
    store = ScoreStore(tmp_path / "scores.sqlite")
    views = [llm, *(library.attach(llm) for library in libraries(llm))]
    first = [MaskScorer(view, ids, store) for view in views]
    scores = [scorer.nll_many(MASKS) for scorer in first]
    assert [scorer.evaluations for scorer in first] == [len(MASKS)] * 3
    assert scores[0] != scores[1]
    again = [MaskScorer(view, ids, store) for view in views]
    assert [scorer.nll_many(MASKS) for scorer in again] == scores
    assert [scorer.evaluations for scorer in again] == [0] * 3
