"""The benchmark of scoring plans: its sides have as many different blocks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import nll_plans
from rap_env.plan import as_plan
from rap_env.scoring.scorer import MaskScorer
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_masks_of_an_episode_grow_by_a_block():
    masks = nll_plans.episode_masks(8, 2, 5)
    assert [len(mask) for mask in masks] == [1, 2, 3, 4, 5] * 2
    assert all(one <= other for one, other in itertools.pairwise(masks[:5]))


def test_sides_lower_what_their_masks_keep_and_run_as_many_blocks():
    llm = tiny_llm("llama", layers=4)
    masks = nll_plans.episode_masks(8, 2, 5)
    sides = nll_plans.plan_sides(llm.facts, masks)
    assert {"masks", "weights int8", "weights int4", "caches int8", "caches int4"} == set(sides)
    runs = {}
    for name, plans in sides.items():
        assert [as_plan(plan).removed for plan in plans] == masks
        scorer = MaskScorer(llm, tokens())
        scorer.nll_many(plans)
        runs[name] = scorer.block_forwards
    assert len(set(runs.values())) == 1
    one = sides["weights int4"][0]
    kept = {index for index, _ in one.weights}
    assert kept == set(range(8)) - one.removed.indices


def test_it_writes_a_record_with_a_ratio_for_each_level(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama_tied", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = nll_plans.NLLPlansSettings(
        repeats=2, threads=1, results_dir=str(tmp_path / "out"), model=str(folder),
        windows=2, window_tokens=40, episodes=1, removals=3,
    )  # fmt: skip
    nll_plans.main(settings)
    (file,) = (tmp_path / "out").glob("*.json")
    record = json.loads(file.read_text())
    assert [target["at_most"] for target in record["targets"]] == [1.15, 1.15]
    assert record["measured"]["times_masks"]["masks"]["median"] == 1.0
    assert len(set(record["measured"]["mean_nll"].values())) > 2
