"""The best known plans: a lookup gives the best one that fits, and files keep all of them."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rap_env.artifacts import artifact_kind
from rap_env.errors import ArtifactError
from rap_env.importance.plan_frontier import PlanFrontier
from rap_env.ladder.item_bytes import LadderBytes
from rap_env.ladder.items import Ladder
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from tests.tiny import tiny_llm

RECORDED = [
    path
    for path in sorted((Path(__file__).parents[2] / "results").glob("*/profile/frontier.json"))
    if artifact_kind(path) == PlanFrontier.KIND
]


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def frontier(llm):
    rng = np.random.default_rng(0)
    ladder = Ladder.of(llm.facts, "all")
    plans = {Plan(), Plan.of({"layer00.cache": "int2"})}
    for _ in range(60):
        plan = Plan()
        for _ in range(rng.integers(1, 12)):
            plan = ladder.lower(plan, int(rng.choice(np.flatnonzero(ladder.valid_actions(plan)))))
        plans.add(plan)
    scores = {plan: 3.0 + float(rng.random()) * bool(plan) for plan in plans}
    provenance = {"model": "t", "fingerprint": llm.facts.fingerprint, "scoring": {}}
    return PlanFrontier(llm.facts.num_layers, 3.0, scores, len(scores), 1.0, {}, provenance)


def test_a_lookup_gives_the_best_plan_that_fits(llm, frontier):
    ladder, memory = Ladder.of(llm.facts, "all"), MemoryModel(llm)
    known, item_bytes = frontier.on(ladder), LadderBytes(memory, ladder)
    assert len(known.plans) == len(frontier.scores) - 1, "the ladder has no int2"
    for batch, tokens in ((1, 16), (4, 40)):
        costs = item_bytes.costs(batch, tokens)
        request = Request(batch, tokens, budget_bytes=1)
        peaks = [memory.peak_bytes(plan, request) for plan in known.plans]
        assert known.peak_bytes(costs).tolist() == peaks
        assert known.best(costs, min(peaks) - 1) is None
        for budget in sorted({*peaks}):
            fitting = [
                plan for plan, peak in zip(known.plans, peaks, strict=True) if peak <= budget
            ]
            best = min(frontier.scores[plan] for plan in fitting)
            assert frontier.scores[known.best(costs, budget)] == best


def test_a_file_keeps_every_plan(llm, frontier, tmp_path):
    frontier.save(tmp_path / "f.json")
    again = PlanFrontier.load(tmp_path / "f.json", llm)
    assert again.scores == frontier.scores
    assert {type(plan) for plan in again.scores} == {Plan, Plan}
    assert all(plan == plan for plan in again.scores)
    with pytest.raises(ArtifactError, match="other weights"):
        PlanFrontier.load(tmp_path / "f.json", tiny_llm(seed=7))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.parent.name)
def test_committed_tables_are_still_read(path):
    provenance = json.loads(gzip.decompress(path.read_bytes()))["body"]["provenance"]
    repair = provenance["scoring"].get("repair", "")
    facts = SimpleNamespace(fingerprint=provenance["fingerprint"], repair=repair)
    found = PlanFrontier.load(path, SimpleNamespace(facts=facts))
    assert found.scores[Plan()] == found.native_nll
    assert sum(not plan.is_mask for plan in found.scores) > 100
