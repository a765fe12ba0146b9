"""The best known plans by request; files of importance, which load without torch."""

import numpy as np
import pytest

from rap_env.errors import ArtifactError
from rap_env.importance.plan_table import PlanTable
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from tests.tiny import tiny_llm


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def frontier(llm):
    rng = np.random.default_rng(0)
    ladder = Ladder.of(llm.facts, "all")
    plans = {Plan(), Plan.of({"layer00.cache": "int2"})}
    for _ in range(60):
        state = LadderBytes(MemoryModel(llm), ladder).costs(1, 16).state()
        for _ in range(rng.integers(1, 12)):
            state.lower(int(rng.choice([n for n in range(len(ladder)) if state.is_valid(n)])))
        plans.add(state.plan)
    scores = {plan: 3.0 + float(rng.random()) * bool(plan) for plan in plans}
    provenance = {"model": "t", "fingerprint": llm.facts.fingerprint, "scoring": {}}
    return PlanTable(llm.facts.num_layers, 3.0, scores, len(scores), 1.0, {}, provenance)


def test_a_lookup_gives_the_best_plan_that_fits(llm, frontier):
    ladder, memory = Ladder.of(llm.facts, "all"), MemoryModel(llm)
    known, ladder_bytes = frontier.on(ladder), LadderBytes(memory, ladder)
    assert len(known.plans) == len(frontier.scores) - 1, "the ladder has no int2"
    for shape in ((1, 16), (4, 40)):
        costs = ladder_bytes.costs(*shape)
        request = Request(*shape, budget_bytes=1)
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
    again = PlanTable.load(tmp_path / "f.json", llm)
    assert again.scores == frontier.scores
    assert (again.sha256, again.settings) == (frontier.sha256, frontier.settings)
    with pytest.raises(ArtifactError, match="other weights"):
        PlanTable.load(tmp_path / "f.json", tiny_llm(seed=7))
    (tmp_path / "f.json").write_bytes((tmp_path / "f.json").read_bytes()[:-50])
    with pytest.raises(ArtifactError, match="truncated"):
        PlanTable.load(tmp_path / "f.json", llm)
