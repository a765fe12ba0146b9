"""A replay of a tiny model from settings to records: complete runs, resuming, rejected settings."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.replay_settings import MASK_SYSTEMS, ReplayConfig
from experiments.contexts import load_text
from experiments.replay.study import STUDY
from experiments.replay.workload import make_workload
from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import read_records
from rap_env.errors import RapError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.replay.replayed import tiny_replay, write_model


@pytest.fixture(scope="module")
def config(base):
    write_model(base)
    return tiny_replay(base)


@pytest.fixture(scope="module")
def folder(config):
    return STUDY.run(config, config.stage_dir("replay"))


@pytest.fixture(scope="module")
def rows(folder):
    return {row.system: row for row in STUDY.read(folder)}


def test_every_system_has_a_row_in_the_order_of_the_settings(rows):
    assert list(rows) == list(MASK_SYSTEMS)
    for row in rows.values():
        assert row.requests == 24
        assert row.served == row.outcomes["served"] == len(row.ttft_s)
        assert len(row.right) <= 6
        assert row.steps == sorted(row.steps)
    assert {row.budget_least_bytes for row in rows.values()} == {
        int(0.36 * rows["dense"].depends_on["reference_bytes"])
    }


def test_adaptive_systems_serve_everything_within_the_budget(rows):
    for name in ("frontier", "rap", "oracle", "static_gsi", "static_shortgpt"):
        assert rows[name].served == 24
        assert rows[name].violations == 0
        assert rows[name].violation_byte_s == 0
    for name in ("greedy", "frontier", "rap"):
        assert rows[name].switches > 0
        assert rows[name].removed_mean > 0


def test_the_dense_model_never_removes_and_exceeds_the_budget_when_it_falls(rows):
    dense = rows["dense"]
    assert dense.switches == dense.removed_mean == 0
    assert dense.violation_byte_s > 0
    assert all(removed == [] for *_, removed in dense.steps)
    assert dense.same_fraction == 1
    assert set(dense.losses) == {0}
    assert dense.mask_loss_mean == 0


def test_static_masks_fit_the_longest_request_never_change_and_have_the_scorers_loss(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    memory, longest = MemoryModel(llm), make_workload(config, llm).longest_tokens
    text = load_text(config.replay.text, "report", llm, progress=False)
    scorer = MaskScorer(llm, text.spread(1))
    for name in ("static_gsi", "static_shortgpt"):
        row = rows[name]
        (removed,) = {tuple(removed) for *_, removed in row.steps}
        mask = Plan.removing(*removed)
        least = Request(1, longest, row.budget_least_bytes)
        assert memory.peak_bytes(mask, least) <= least.budget_bytes
        assert row.switches == 0
        assert row.mask_loss_mean == pytest.approx(scorer.nll(mask) - scorer.dense_nll, abs=1e-5)


def test_references_are_the_dense_models_greedy_continuations(config, folder):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    workload = make_workload(config, llm)
    references = {r["number"]: r for r in read_records(folder / "references.jsonl")}
    assert set(references) == set(range(24))
    for asked in workload.requests[:5]:
        ids = torch.tensor([asked.prompt_ids])
        losses = []
        for token in references[asked.number]["token_ids"]:
            with torch.no_grad():
                logits = llm.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            assert int(logits.argmax()) == token
            losses.append(-float(logits[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(losses) == asked.new_tokens
        nll = references[asked.number]["nll"]
        assert nll == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_decisions_are_logged(folder, rows):
    for name in ("frontier", "rap"):
        assert len(read_records(folder / "decisions" / f"{name}.jsonl")) == rows[name].switches


def test_rows_have_provenance_without_local_paths(rows, base):
    for row in rows.values():
        assert row.provenance["load"]["trace"] == "trace.csv"
        assert str(base) not in json.dumps({**row.depends_on, "model": ""})


def test_other_settings_are_rejected_in_the_same_folder(config, folder):
    changed = replace(config, replay=replace(config.replay, every=2))
    with pytest.raises(ExperimentError, match=r"replay\.every: 1 -> 2"):
        STUDY.run(changed, folder)
    fewer = replace(config, replay=replace(config.replay, systems=["dense"]))
    STUDY.run(fewer, folder)


def test_figures_and_tables_come_from_the_rows_alone(rows, tmp_path):
    data = list(rows.values())
    text = STUDY.markdown(data)
    assert "24 requests of trace.csv" in text
    assert text.count("| RAP policy |") == 4
    STUDY.draw(data, tmp_path)
    assert (tmp_path / "replay_memory.png").stat().st_size > 5000
    assert "No system" in STUDY.markdown([])


def test_invalid_settings_raise_a_short_error():
    with pytest.raises(UnknownNameError, match="Did you mean 'rap'"):
        ReplayConfig(systems=["rapp"])


def changed_replay(config, tmp_path, **changes) -> tuple[Config, object]:
    budget = changes.pop("budget", config.budget)
    changed = replace(config, budget=budget, replay=replace(config.replay, **changes))
    return changed, tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trace": "nothing.csv"}, "cannot be read"),
        ({"policy": "nothing.safetensors"}, "Unknown policy"),
        ({"frontier": "nothing.json"}, "nothing.json"),
        ({"budget": {"name": "cotenants", "unit": "MB"}}, "fraction or bytes"),
        ({"max_prompt_tokens": 60, "token_scale": 9.0}, "accepts 64"),
        ({"text": TextConfig(source="nothing.txt")}, "Cannot read the text"),
        ({"data_root": "nowhere"}, "Cannot read"),
    ],
)
def test_missing_inputs_are_reported_before_the_start(config, tmp_path, changes, sentence):
    changed, run = changed_replay(config, tmp_path, **changes)
    with pytest.raises(RapError, match=sentence):
        STUDY.run(changed, run)
    assert not (run / "replay.jsonl").exists()


def test_a_budget_below_every_static_mask_raises_a_short_error(config, tmp_path):
    tiny = {"name": "cotenants", "unit": "bytes", "capacity": 100, "floor": 100, "sizes": [1]}
    changed, run = changed_replay(config, tmp_path, budget=tiny, systems=["static_gsi"])
    with pytest.raises(ExperimentError, match="raise the budget's floor"):
        STUDY.run(changed, run)


def test_drawn_traffic_needs_no_file(config, tmp_path):
    changed, run = changed_replay(
        config, tmp_path, trace=None, minutes=0.5, arrivals_per_minute=20, token_scale=0.02,
        systems=["rap"],
    )  # fmt: skip
    (row,) = STUDY.read(STUDY.run(changed, run))
    assert row.provenance["load"]["trace"] == "fitted azure-conv"
    assert row.served == row.requests
