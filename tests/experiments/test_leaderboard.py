"""Entries of the leaderboard: equal to the records, and replayed on the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from experiments import leaderboard
from experiments.comparison.result_rows import ResultRow, rows_below
from experiments.leaderboard import check_entry, main
from rap_env.ladder.items import Ladder
from rap_env.leaderboard.entries import (
    ENTRIES,
    Entry,
    Run,
    nested_share,
    nested_shares,
    published_entries,
    table_values,
)
from rap_env.leaderboard.tasks import tasks_of
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.fidelity import spearman
from rap_env.scoring.scorer import PlanScorer
from tests.tiny import VOCAB_SIZE, tiny_llm

RESULTS = Path(__file__).parents[2] / "results"


def recorded_entries(comparison):
    return [e for e in published_entries(comparison) if "records" in e.origin]


RECORDED = [folder.name for folder in sorted(ENTRIES.iterdir()) if recorded_entries(folder.name)]


def test_entries_without_records_are_of_tasks_that_measure_them():
    others = {folder.name for folder in ENTRIES.iterdir()} - set(RECORDED)
    measured_beside_its_table = {"SmolLM2-v1"}
    assert others == {"Tiny-v0", "TinyEven-v0", "TinyGrouped-v0", *measured_beside_its_table}


@pytest.mark.parametrize("comparison", RECORDED)
def test_published_entries_are_what_the_records_say(comparison):
    task, entries = tasks_of(comparison)[0], recorded_entries(comparison)
    (name,) = {Path(entry.origin["records"]).name for entry in entries}
    rows = rows_below(RESULTS / name / "evaluate")
    rows += ResultRow.read(RESULTS / "leaderboard" / f"{comparison}.jsonl")
    recorded = {(r.method, r.seed, Request(*r.shape, r.budget_bytes)): r for r in rows}
    assert {row.method for row in rows} == {entry.origin["method"] for entry in entries}
    for entry in entries:
        for run in entry.runs:
            for number, request in enumerate(task.requests):
                row = recorded[entry.origin["method"], run.seed, request]
                assert Plan.of(run.plans[number]) == row.plan
                assert run.fits[number] == row.fits
                assert run.delta_nll["test"][number] == row.delta_nll
                assert run.delta_nll["calibration"][number] == row.calibration_delta_nll


@pytest.fixture(scope="module")
def replayed():
    """A tiny model with an entry whose numbers are right."""
    llm = tiny_llm(layers=3)
    memory = MemoryModel(llm.facts)
    tokens = torch.randint(3, VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(0))
    scorers = {"calibration": PlanScorer(llm, tokens[:2]), "test": PlanScorer(llm, tokens[2:])}
    masks = [Plan.removing(1), Plan.removing(1, 3, 5)]
    peaks = [memory.peak_bytes(mask, Request(2, 16, budget_bytes=1)) for mask in masks]
    requests = [Request(2, 16, budget_bytes=peak) for peak in peaks]
    delta = {
        split: tuple(scorer.nll(mask) - scorer.native_nll for mask in masks)
        for split, scorer in scorers.items()
    }
    run = Run(
        None,
        tuple(dict.fromkeys(mask.removed_names, "removed") for mask in masks),
        delta,
        (True, True),
    )
    return Entry("mine", "tiny", "x", (run,)), memory, requests, scorers


def changed(entry, **fields):
    return replace(entry, runs=(replace(entry.runs[0], **fields),))


def test_right_numbers_reproduce(replayed):
    entry, memory, requests, scorers = replayed
    assert check_entry(entry, memory, requests, scorers) == []


def test_wrong_numbers_are_found(replayed):
    entry, memory, requests, scorers = replayed
    first, second = entry.runs[0].delta_nll["test"]
    better = {**entry.runs[0].delta_nll, "test": (first - 0.05, second)}
    (sentence,) = check_entry(changed(entry, delta_nll=better), memory, requests, scorers)
    assert "request 0" in sentence
    assert "test" in sentence
    (sentence,) = check_entry(changed(entry, fits=(True, False)), memory, requests, scorers)
    assert "fits=False is wrong" in sentence
    other = changed(entry, plans=(entry.runs[0].plans[0], {"layer00.ffn": "removed"}))
    assert "the plan needs" in check_entry(other, memory, requests, scorers)[0]
    (sentence,) = check_entry(entry, memory, requests[:1], scorers)
    assert "2 plans for 1 requests" in sentence


def test_new_methods_are_ranked_by_what_the_table_predicts():
    """Each method is predicted without its plans: the ranks agree, unlike plans included."""
    for name, methods, least in (("SmolLM2-v0", 12, 0.93), ("SmolLM2-low-bits-v0", 4, 0.95)):
        values = table_values(name)
        measured = {
            entry.name: float(entry.scores("test").mean())
            for entry in published_entries(name)
            if "records" in entry.origin and entry.name in values
        }
        assert len(measured) == methods
        predicted = {method: values[method].test for method in measured}
        pairs = np.array([(predicted[method], measured[method]) for method in measured])
        assert spearman(*pairs.T) > least
        for entry in published_entries(name):
            if entry.name in measured:  # the table has measured the plans of these
                calibration = float(entry.scores("calibration").mean())
                assert values[entry.name].calibration == pytest.approx(calibration)
                assert values[entry.name].num_predicted == 0
    assert all(0.8 < predicted[name] / measured[name] < 1.2 for name in measured)
    assert not set(predicted.values()) & set(measured.values())


def test_plans_are_nested_if_a_smaller_budget_lowers_all_that_a_larger_one_lowers():
    ladder = Ladder.of(tiny_llm(layers=2).facts, "masks")
    requests = [Request(1, 16, 100), Request(1, 16, 90), Request(1, 16, 80), Request(2, 16, 70)]
    plans = [Plan.removing(1), Plan.removing(1, 2), Plan.removing(2, 3), Plan()]
    assert nested_share(requests, plans, ladder) == pytest.approx(1 / 3)
    assert nested_share(requests, [*plans[:2], Plan.removing(0, 1, 2), Plan()], ladder) == 1.0


@pytest.mark.parametrize("comparison", ["SmolLM2-v1", "TinyEven-v0"])
def test_plans_of_lists_are_nested_with_a_table_and_without_one(comparison):
    shares = nested_shares(comparison)
    assert {entry.name for entry in published_entries(comparison)} - set(shares) == {
        "Do nothing",
        "Remove everything",
    }
    assert shares["Tuned list"] == shares["Fixed list"] == 1.0
    assert 0 <= shares["Random orders"] < 0.5


def test_a_method_is_published_with_a_rank_only_if_its_plans_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "ENTRIES", tmp_path)
    methods = ["rap_env.policies.orders:Random", "rap_env.policies.orders:OneShot"]
    ran = CliRunner().invoke(main, ["publish", "RAPLadder/SmolLM2-Table-v1", *methods])
    assert ran.exit_code == 0, ran.output
    labelled = Entry.load(tmp_path / "SmolLM2-v1" / "one_shot.json.gz")
    assert labelled.name == "One-shot", "the label of all tables"
    entry = Entry.load(tmp_path / "SmolLM2-v1" / "random.json.gz")
    assert entry.name == "Random"
    assert entry.description == "Lowers random items; the same seed and request give the same plan"
    assert len(entry.runs[0].plans) == 30
    assert set(entry.runs[0].delta_nll) == {"calibration", "test"}, "a published method: measured"
    wrong = CliRunner().invoke(main, ["publish", "RAPLadder/SmolLM2-Table-v1", "x.y:Z"])
    assert wrong.exit_code != 0
    assert "x.y" in wrong.output
