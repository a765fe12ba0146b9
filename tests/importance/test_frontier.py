"""The frontier: the best masks for each pair of counts, with few evaluations."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.importance.frontier import Frontier
from rap_env.importance.frontier_search import FrontierConfig, build_frontier
from rap_env.importance.gsi_search import gsi
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import ScoreStore
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_llm

LAYERS = 5
FRACTIONS = (0.9, 0.8, 0.7, 0.6)
PACKAGED = Path(__file__).parents[2] / "rap_env/policies/packaged/smollm2-135m.frontier.json"


def requests(llm):
    memory = MemoryModel(llm)
    shapes = itertools.product((1, 8), (8, 16), FRACTIONS)
    return [Request.at_fraction(memory, *shape) for shape in shapes]


def built(llm, store=None, **settings):
    scorer = MaskScorer(llm, tokens(), store)
    return build_frontier(scorer, requests(llm), FrontierConfig(batch=16, **settings))


@pytest.fixture(scope="module")
def llm():
    return tiny_llm(layers=LAYERS)


@pytest.fixture(scope="module")
def frontier(llm):
    return built(llm, evaluations=250)


def test_entries_are_the_best_scored_masks(frontier):
    seen = [(mask.count_removed("attn"), mask.count("ffn")) for mask, _ in frontier.entries]
    assert len(set(seen)) == len(seen)
    for mask, loss in frontier.entries:
        counts = mask.count_removed("attn"), mask.count("ffn")
        same = [nll for other, nll in frontier.scores.items()
                if (other.count_removed("attn"), other.count("ffn")) == counts]  # fmt: skip
        assert loss == min(same) - frontier.dense_nll


def test_scores_equal_the_models_and_are_counted(llm, frontier):
    scorer = MaskScorer(llm, tokens())
    some = list(frontier.scores)[::17]
    assert [frontier.scores[mask] for mask in some] == scorer.nll_many(some)
    assert frontier.evaluations == len(frontier.scores) == frontier.evaluations_run <= 250


def test_answers_beat_gsi_and_are_near_optimal(llm, frontier):
    blocks, scorer, memory = range(2 * LAYERS), MaskScorer(llm, tokens()), MemoryModel(llm)
    everything = [
        Plan.removing(*part)
        for size in range(2 * LAYERS + 1)
        for part in itertools.combinations(blocks, size)
    ]
    nll = dict(zip(everything, scorer.nll_many(everything), strict=True))
    order = gsi(scorer, progress=False).order_indices
    prefixes = [Plan.removing(*order[:size]) for size in range(len(order) + 1)]
    found, best, followed = [], [], []
    for request in requests(llm):
        fit = {m for m in nll if memory.peak_bytes(m, request) <= request.budget_bytes}
        mask = frontier.best(memory, request)
        assert mask in fit
        found.append(nll[mask])
        best.append(min(nll[mask] for mask in fit))
        followed.append(next(nll[mask] for mask in prefixes if mask in fit))
    assert np.mean(found) < np.mean(followed)
    gained = (np.mean(followed) - np.mean(found)) / (np.mean(followed) - np.mean(best))
    assert 0.7 < gained <= 1


def test_nothing_fits_an_impossible_budget(llm, frontier):
    assert frontier.best(MemoryModel(llm), Request(1, 8, 1)) is None


@pytest.mark.slow
def test_an_interrupted_search_resumes_from_the_store(llm, tmp_path):
    whole = built(llm, evaluations=150)
    store = ScoreStore(tmp_path / "scores.sqlite")
    built(llm, store, evaluations=70)
    again = built(llm, store, evaluations=150)
    assert again.scores == whole.scores
    assert again.evaluations == whole.evaluations
    assert again.evaluations_run < whole.evaluations_run - 60


def test_it_round_trips_and_is_rejected_for_other_models(llm, frontier, tmp_path):
    path = tmp_path / "frontier.json"
    frontier.save(path)
    again = Frontier.load(path, llm)
    assert again.entries == frontier.entries
    assert again.settings == frontier.settings
    with pytest.raises(ArtifactError, match="other weights"):
        Frontier.load(path, tiny_llm(layers=LAYERS, seed=9))
    path.write_text(path.read_text()[:-50])
    with pytest.raises(ArtifactError, match="truncated"):
        Frontier.load(path, llm)


@pytest.mark.parametrize("wrong", [{"evaluations": 0}, {"looks": 0}, {"deepest_loss": 0.0}])
def test_impossible_settings_are_rejected(wrong):
    with pytest.raises(InvalidRequestError, match="must be at least 1"):
        replace(FrontierConfig(), **wrong)


def test_the_packaged_frontier_is_read():
    provenance = json.loads(PACKAGED.read_text())["body"]["provenance"]
    facts = SimpleNamespace(
        fingerprint=provenance["fingerprint"], repair=provenance["scoring"].get("repair", "")
    )
    frontier = Frontier.load(PACKAGED, SimpleNamespace(facts=facts))
    assert frontier.scores[Plan()] == frontier.dense_nll
    assert all(mask.check(frontier.num_blocks) for mask in frontier.scores if mask)
    assert frontier.entries[0][1] <= 0
