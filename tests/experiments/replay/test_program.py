"""A replay of a tiny model from settings to records: complete runs, resuming, rejected settings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.serving import MASK_SYSTEMS, ReplayConfig
from experiments.errors import ExperimentError
from experiments.replay.figures import draw_all, main, read_replay
from experiments.replay.outcomes import REQUESTS, STEPS
from experiments.replay.program import DECISIONS, FILE, REFERENCES, replay
from experiments.replay.records import OUTCOMES, ReplayRow
from experiments.replay.tables import replay_markdown, replay_text
from experiments.replay.time_series import recorded_mask
from experiments.study.records import read_records
from rap_env.blocks import BlockMask
from rap_env.errors import ArtifactError, RapError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.replay.replayed import LAYERS, tiny_replay, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(folder / "cache"))
        write_model(folder)
        yield folder


@pytest.fixture(scope="module")
def config(base):
    return tiny_replay(base)


@pytest.fixture(scope="module")
def folder(config):
    replay(config, config.stage_dir("replay"))
    return config.stage_dir("replay")


@pytest.fixture(scope="module")
def rows(folder):
    return {row.system: row for row in ReplayRow.read(folder / FILE)}


def test_every_system_has_a_row_in_the_order_of_the_settings(rows):
    assert list(rows) == list(MASK_SYSTEMS)


def test_all_systems_get_the_same_requests_and_budget(folder, rows):
    assert len({row.provenance["depends_on"]["load_sha256"] for row in rows.values()}) == 1
    asked = {
        name: [(r["number"], r["arrived_s"], r["prompt_tokens"], r["new_tokens"]) for r in records]
        for name, records in read_replay(folder).requests.items()
    }
    assert len(asked["dense"]) == 24
    assert all(found == asked["dense"] for found in asked.values())
    assert {row.budget_least_bytes for row in rows.values()} == {
        int(0.36 * rows["dense"].provenance["depends_on"]["reference_bytes"])
    }


def test_each_request_has_one_outcome_and_the_counts_add_up(folder, rows):
    for name, row in rows.items():
        outcomes = [r["outcome"] for r in read_records(folder / REQUESTS / f"{name}.jsonl")]
        assert set(outcomes) <= set(OUTCOMES)
        assert row.served == outcomes.count("served")
        assert row.served + row.refused + row.queue_full + row.timed_out + row.failed == 24
        assert row.served_fraction == row.served / 24
        assert row.servable == 24
        assert row.tokens == sum(
            r["tokens"] for r in read_records(folder / REQUESTS / f"{name}.jsonl")
            if r["outcome"] == "served"
        )  # fmt: skip


def test_adaptive_systems_serve_everything_within_the_budget(rows):
    for name in ("frontier", "rap", "oracle", "static_gsi", "static_shortgpt"):
        assert rows[name].served == 24
        assert rows[name].violations == 0
        assert rows[name].violation_byte_s == 0
    for name in ("greedy", "frontier", "rap"):
        assert rows[name].switches > 0
        assert rows[name].removed_mean > 0


def test_the_dense_model_never_removes_and_holds_more_than_the_budget_when_it_falls(folder, rows):
    dense = rows["dense"]
    assert dense.switches == 0
    assert dense.removed_mean == 0
    assert dense.violation_byte_s > 0
    assert all(s["mask"] == [] for s in read_records(folder / STEPS / "dense.jsonl"))


def test_static_masks_always_fit_and_never_change(config, folder, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    memory = MemoryModel(llm)
    for name in ("static_gsi", "static_shortgpt"):
        notes = rows[name].notes
        mask = BlockMask.of(*notes["mask"])
        shape = notes["batch_size"], notes["seq_len_tokens"]
        from rap_env.request import Request

        least = Request(*shape, rows[name].budget_least_bytes)
        assert memory.peak_bytes(mask, least) <= least.budget_bytes
        steps = read_records(folder / STEPS / f"{name}.jsonl")
        assert {recorded_mask(step["mask"]) for step in steps} == {mask}
        assert rows[name].switches == 0


def test_the_dense_model_has_no_quality_loss(rows):
    assert rows["dense"].same_fraction == 1
    assert rows["dense"].loss_mean == 0
    assert rows["dense"].mask_loss_mean == 0


def test_losses_are_means_over_served_requests(folder, rows):
    for name, row in rows.items():
        losses = [r["loss"] for r in read_records(folder / REQUESTS / f"{name}.jsonl")
                  if r["outcome"] == "served"]  # fmt: skip
        assert row.loss_mean == pytest.approx(sum(losses) / len(losses), abs=1e-3)
        assert row.loss_ci_low <= row.loss_mean <= row.loss_ci_high
        assert row.accuracy_n <= 6


def test_references_are_the_dense_models_greedy_continuations(config, folder):
    import torch

    from experiments.replay.workload import make_workload

    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    workload = make_workload(config, llm)
    found = {r["number"]: r for r in read_records(folder / REFERENCES)}
    assert set(found) == set(range(24))
    for asked in workload.requests[:5]:
        ids = torch.tensor([asked.prompt_ids])
        losses = []
        for token in found[asked.number]["token_ids"]:
            with torch.no_grad():
                logits = llm.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            assert int(logits.argmax()) == token
            losses.append(-float(logits[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(losses) == asked.new_tokens
        assert found[asked.number]["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_decisions_are_logged(folder, rows):
    for name in ("frontier", "rap"):
        assert len(read_records(folder / DECISIONS / f"{name}.jsonl")) == rows[name].switches


def test_rows_have_provenance_without_local_paths(folder, rows, base):
    for row in rows.values():
        assert row.provenance["load"]["trace"] == "trace.csv"
        assert {"python", "packages", "machine", "git", "seeds"} <= set(row.provenance)
        assert str(base) not in json.dumps(
            {k: v for k, v in row.to_record().items() if k != "provenance"}
            | {"depends_on": {**row.provenance["depends_on"], "model": ""}}
        )


def test_existing_rows_are_not_measured_again(config, folder, monkeypatch):
    before = (folder / FILE).read_bytes()

    def run(*_: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr("experiments.replay.program.Replay._run", run)
    replay(config, folder)
    assert (folder / FILE).read_bytes() == before


def test_a_killed_system_restarts_and_finished_ones_are_kept(config, folder, monkeypatch):
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    kept = lines[:-1]
    (folder / FILE).write_bytes(b"".join(kept) + lines[-1][: len(lines[-1]) // 2])
    ran = []
    serve = "experiments.replay.harness.ReplayHarness.run"
    from experiments.replay.harness import ReplayHarness

    original = ReplayHarness.run

    def noted(self, name, *args, **kwargs):
        ran.append(name)
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(serve, noted)
    replay(config, folder)
    assert ran == ["oracle"]
    found = (folder / FILE).read_bytes().splitlines(keepends=True)
    assert found[:-1] == kept
    assert json.loads(found[-1])["system"] == "oracle"


def test_other_settings_are_rejected_in_the_same_folder(config, folder):
    changed = replace(config, replay=replace(config.replay, every=2))
    with pytest.raises(ExperimentError, match=r"replay\.every: 1 -> 2"):
        replay(changed, folder)
    fewer = replace(config, replay=replace(config.replay, systems=["dense"]))
    replay(fewer, folder)


@pytest.mark.slow
def test_figures_and_tables_come_from_the_records_alone(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = draw_all(folder, tmp_path)
    assert {path.stem for path in paths} >= {
        "replay_memory", "replay_latency", "replay_quality", "replay_memory_rap"
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)
    assert main([str(tmp_path)]) == 0
    assert "no rows" in capsys.readouterr().out
    assert main([]) == 2


def test_tables_have_a_line_for_each_system(folder, rows):
    in_markdown, in_terminal = (
        replay_markdown(list(rows.values())),
        replay_text(list(rows.values())),
    )
    assert (folder / "tables.md").exists()
    for text in (in_markdown, in_terminal):
        assert "24 requests of trace.csv" in " ".join(text.split())
    assert in_markdown.count("| RAP policy |") == 4
    assert max(map(len, in_terminal.splitlines())) <= 100


def test_the_picture_shows_as_many_layers_as_the_model_has(folder):
    assert read_replay(folder).num_layers == LAYERS


def test_a_row_of_another_version_is_rejected(rows):
    record = rows["rap"].to_record()
    assert ReplayRow.from_record(record) == rows["rap"]
    assert ReplayRow.from_record({**record, "energy_j": None}) == rows["rap"]  # an older record
    with pytest.raises(ArtifactError, match="unknown keys: colour"):
        ReplayRow.from_record({**record, "colour": "red"})


def test_mask_losses_equal_those_of_the_scorer(config, folder, rows):
    """The ΔNLL of masks equals that of the scorer on the first windows of the text."""
    from experiments.replay.program import Replay

    made = Replay(config, folder)
    scorer = made._scorer()
    mask = BlockMask.of(*rows["static_gsi"].notes["mask"])
    assert isinstance(scorer, MaskScorer)
    assert rows["static_gsi"].mask_loss_mean == pytest.approx(
        scorer.nll(mask) - scorer.dense_nll, abs=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"systems": ["dense", "dense"]}, ExperimentError, "none twice"),
        ({"systems": []}, ExperimentError, "at least one entry"),
        ({"systems": ["rapp"]}, UnknownNameError, "Did you mean 'rap'"),
        ({"timing": "wal"}, UnknownNameError, "Did you mean 'wall'"),
        ({"known_share": 1.5}, ExperimentError, "at least 0 and at most 1, not 1.5"),
        ({"known_task": "lambada_openai"}, ExperimentError, "needs replay.data_root"),
        ({"reference": "8by4"}, ExperimentError, "8by4"),
        ({"queue_timeout_s": 0}, ExperimentError, "queue_timeout_s must be above 0"),
        ({"every": 0}, ExperimentError, "replay.every must be at least 1, not 0"),
    ],
)
def test_invalid_settings_raise_a_short_error(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        ReplayConfig(**changes)


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
        ({"gsi": "nothing.json"}, "no GSI artifact"),
        ({"budget": {}}, "needs a budget"),
        ({"budget": {"name": "constant", "level": 0.5, "unit": "MB"}}, "fraction or bytes"),
        ({"max_prompt_tokens": 60, "token_scale": 9.0}, "accepts 64"),
        ({"text": TextConfig(source="nothing.txt")}, "Cannot read the text"),
        ({"known_task": "lambada_openai", "data_root": "nowhere"}, "Cannot read"),
    ],
)
def test_missing_inputs_are_reported_before_the_start(config, tmp_path, changes, sentence):
    changed, run = changed_replay(config, tmp_path, **changes)
    with pytest.raises(RapError, match=sentence):
        replay(changed, run)
    assert not (run / FILE).exists()


def test_a_budget_below_every_static_mask_raises_a_short_error(config, tmp_path):
    tiny = {"name": "constant", "unit": "bytes", "level": 100}
    changed, run = changed_replay(config, tmp_path, budget=tiny, systems=["static_gsi"])
    with pytest.raises(ExperimentError, match="raise the budget's floor"):
        replay(changed, run)


def test_drawn_traffic_needs_no_file(config, tmp_path):
    changed, run = changed_replay(
        config, tmp_path, trace=None, minutes=0.5, arrivals_per_minute=20, token_scale=0.02,
        systems=["rap"], figures=False, mask_loss_windows=0,
    )  # fmt: skip
    (row,) = ReplayRow.read(replay(changed, run))
    assert row.provenance["load"]["trace"] == "fitted azure-conv"
    assert row.served == row.requests
    assert row.mask_loss_mean is None
