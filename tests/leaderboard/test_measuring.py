"""Plans that a table lacks are measured on the model, beside the table, once."""

from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest

import rap_env
from rap_env.errors import ArtifactError
from rap_env.leaderboard import evaluation
from rap_env.leaderboard.measuring import TaskLosses
from rap_env.leaderboard.tasks import SPLITS, PinnedTask, pinned_task, pinned_tasks
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.held_out import HeldOutLosses
from rap_env.scoring.scorer import PlanScorer
from tests.envs.tiny_contexts import live_context
from tests.scoring.tiny_table import all_masks, table_of
from tests.tiny import tiny_llm

NAME = "RAPPrune/Measured-Table-v0"


@pytest.fixture(scope="module")
def real(model_folder, tmp_path_factory):
    """A saved model of four layers, a table of 150 of its 256 masks, and a pinned task on it."""
    folder = tmp_path_factory.mktemp("task")
    texts = {}
    for number, role in enumerate(("calibration", "report")):
        file = folder / f"{role}.txt"
        words = np.random.default_rng(number).choice(["red", "blue", "tree", "sea", "sky"], 900)
        file.write_text(" ".join(words))
        texts[role] = CorpusConfig(str(file), windows=2, window_tokens=16, role=role)
    llm = load_llm(model_folder, dtype="float32", weights="bf16")
    corpora = {role: load_corpus(text, llm) for role, text in texts.items()}
    context = live_context(llm, corpora["calibration"], importance="one_shot")
    scorers = {"calibration": context.scorer, "test": PlanScorer(llm, corpora["report"])}
    masks = all_masks(8)[:150]
    delta_nll = {
        split: {mask: scorer.nll(mask) - scorer.native_nll for mask in masks}
        for split, scorer in scorers.items()
    }
    table = table_of(context, masks)
    table = replace(
        table,
        facts=replace(table.facts, name=str(model_folder)),
        settings={**table.settings, "calibration": asdict(texts["calibration"])},
        held_out=HeldOutLosses.fitted(corpora["report"].provenance, *delta_nll.values(), 8),
    )
    table.save(folder / "table.json")
    memory = MemoryModel(llm)
    unknown = all_masks(8)[-6:-1]
    requests = tuple(
        Request(number, 16, memory.peak_bytes(mask, Request(number, 16, 1)))
        for number, mask in enumerate(unknown, start=1)
    )
    model = f"score_table:{folder / 'table.json'}"
    arguments = {"model": model, "importance": "one_shot", "workload": "azure-conv"}
    task = PinnedTask(
        NAME, "RAPPrune-v0", arguments, requests, "Measured-v0", corpora["calibration"].sha256,
        {**asdict(texts["report"]), "sha256": corpora["report"].sha256}, 61, -1.0,
    )  # fmt: skip
    gym.register(NAME, "rap_env.envs.prune:RAPPruneEnv", kwargs=arguments)
    yield task, dict(zip(requests, unknown, strict=True)), scorers, folder / "table.json"
    del gym.registry[NAME]


class Known:
    """Chooses given plans."""

    def __init__(self, plans):
        self.choose = plans.__getitem__


@pytest.fixture
def task(real, monkeypatch):
    monkeypatch.setattr(evaluation, "pinned_task", lambda _: real[0])
    return real[0]


def test_predicted_plans_have_no_rank_until_the_model_has_run_them(real, task):
    _, plans, scorers, file = real
    before = file.read_bytes()
    predicted = rap_env.evaluate(Known(plans), NAME, "test", name="mine")
    assert predicted.num_predicted == predicted.num_unknown == len(plans)
    assert "mine (this)         -" in str(predicted)
    assert "measure=True" in str(predicted)
    assert not predicted.entry("x").measured_on("test")

    measured = rap_env.evaluate(Known(plans), NAME, "test", name="mine", measure=True)
    again = rap_env.evaluate(Known(plans), NAME, "test", name="mine")  # from the file
    for result in (measured, again):
        assert result.num_predicted == 0
        assert result.num_unknown == len(plans)
        assert result.predicted_delta_nll == pytest.approx(predicted.mean_delta_nll)
        assert f"{result.mean_delta_nll:.4f}" in str(result)
        for cell in result.cells:
            for split, loss in (("test", cell.loss), ("calibration", cell.calibration)):
                rise = scorers[split].nll(cell.plan) - scorers[split].native_nll
                assert loss.measured == pytest.approx(rise, abs=1e-6)
        entry = result.entry("x")
        assert entry.measured_on("test")
        assert entry.measured_on("calibration")
    assert file.read_bytes() == before, "others train on the same table"


def test_a_measurement_that_was_killed_goes_on(real, task, monkeypatch):
    plans = [*real[1].values()]
    context = task.make().unwrapped.context
    losses = TaskLosses(task, context)
    put = losses._store.put

    def killed(*arguments):
        put(*arguments)
        if len(losses._store) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(losses._store, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        losses.measure(plans, "test")
    later = TaskLosses(task, context)
    left = [plan for plan in plans if later.of(plan, "test").measured is None]
    assert 0 < len(left) < len(plans)
    later.measure(plans, "test")
    assert later.scorer("test").evaluations <= len(left) + 1, "and the native model"
    assert all(later.of(plan, "test").measured is not None for plan in plans)


def test_a_calibration_text_that_cannot_be_made_again_leaves_the_other_values(
    real, task, monkeypatch, caplog
):
    plans = real[1]
    role = TaskLosses._text

    def text(self, split):
        given = role(self, split)
        return given if split == "test" else replace(given, seed=given.seed + 1)

    monkeypatch.setattr(TaskLosses, "_text", text)
    result = rap_env.evaluate(Known(plans), NAME, "test", name="mine", measure=True)
    assert "stay predicted" in caplog.text
    assert result.num_predicted == 0
    entry = result.entry("x")
    assert entry.measured_on("test")
    assert not entry.measured_on("calibration")


def test_another_model_than_that_of_the_table_is_refused(real, task):
    context = task.make().unwrapped.context
    losses = TaskLosses(task, context)
    losses.table = replace(context.table, facts=replace(context.table.facts, fingerprint="other"))
    with pytest.raises(ArtifactError, match="cannot be measured beside it"):
        losses.measure(real[1].values(), "calibration")


def test_the_texts_of_all_pinned_tables_can_be_described():
    tasks = [t for t in pinned_tasks().values() if "score_table:" in str(t.arguments["model"])]
    assert len(tasks) == 4
    for task in tasks:
        losses = TaskLosses(task, task.make().unwrapped.context)
        texts = [losses._text(split) for split in SPLITS]
        assert [text.sha256 for text in texts] == [*map(losses.text_sha256, SPLITS)]


def test_test_texts_are_in_the_package_by_the_hash_of_their_tokens():
    llm = tiny_llm()
    wikitext = "wikitext/validation.jsonl"
    tasks = [t for t in pinned_tasks().values() if t.test_text["source"] == wikitext]
    assert len(tasks) > 5
    for task in tasks:
        corpus = load_corpus(task.test_text_config, llm)
        assert corpus.provenance == task.test_text
    live = pinned_task("RAPPrune/SmolLM2-v1")
    text = CorpusConfig(**live.arguments["calibration"])
    assert load_corpus(text, llm).sha256 == live.calibration_sha256
