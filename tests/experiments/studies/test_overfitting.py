"""The study of overfitting on a tiny real model: losses, gap, resuming, rejected settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agents.baselines.base import price_per_byte
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.model import ImportanceConfig, ModelConfig
from experiments.config.studies import OverfittingConfig
from experiments.errors import ExperimentError
from experiments.studies.overfitting import FILE, GSIPerByteBaseline, gap_table, overfitting
from experiments.studies.records import StudyRow
from rap_env.blocks import BlockMask
from rap_env.context.live import LiveContext
from rap_env.llm.loading import load_llm
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("overfitting")
    tiny_model(layers=4).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    text = base / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("abcdefghij ,."), 3000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="overfitting", name="tiny", runs_dir=str(base / "runs"), progress=False,
            store=str(base / "scores.sqlite"),
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source=str(text), windows=2, window_tokens=36),
            importance=ImportanceConfig(gsi_removals=4, gsi_method="halving"),
            evaluate=EvaluateConfig(
                text=TextConfig(source=str(text), windows=3, window_tokens=36)
            ),
            overfitting=OverfittingConfig(
                windows=[2, 4, 8], seeds=[0, 1], most_windows=8, cells=["1x16@0.8", "2x32@0.7"]
            ),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config):
    overfitting(config, config.stage_dir("overfitting"))
    return config.stage_dir("overfitting")


@pytest.fixture(scope="module")
def rows(folder):
    return StudyRow.read(folder / FILE)


def test_small_texts_are_drawn_with_more_seeds_than_large_ones(rows):
    draws = {(row.tokens // 36, row.seed) for row in rows}
    assert draws == {(2, 0), (2, 1), (4, 0), (4, 1), (8, 0)}
    assert len(rows) == 5 * 2 * 2  # draws, methods, cells
    assert OverfittingConfig(seeds=[0, 1, 2]).seeds_of(128) == [0, 1, 2]
    assert OverfittingConfig(seeds=[0, 1, 2], most_windows=16).seeds_of(128) == [0]


def test_losses_are_measured_on_search_text_and_held_out_text(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    report = CorpusConfig(**vars(config.evaluate.text), role="report")
    unseen = MaskScorer(llm, load_corpus(report, llm))
    for row in rows:
        seen = replace(config.calibration, windows=row.tokens // 36, seed=row.seed)
        scorer = MaskScorer(llm, load_corpus(CorpusConfig(**vars(seen)), llm))
        mask = BlockMask.of(*row.mask)
        assert row.loss_calibration == pytest.approx(scorer.nll(mask) - scorer.dense_nll, abs=1e-6)
        assert row.loss == pytest.approx(unseen.nll(mask) - unseen.dense_nll, abs=1e-6)
        assert row.peak_bytes <= row.budget_bytes


def test_per_byte_removes_the_least_loss_per_freed_byte(config):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    corpus = load_corpus(CorpusConfig(**vars(config.calibration)), llm)
    context = LiveContext(llm, corpus, gsi_removals=4, progress=False)
    request = Request.at_fraction(context.memory, 1, 16, 0.8)
    mask = GSIPerByteBaseline(context).choose(request)
    freed = context.memory.freed_bytes(request)
    losses = context.gsi.marginal_delta_nll
    prices = np.array([price_per_byte(*pair) for pair in zip(losses, freed, strict=True)])
    kept = [index for index in range(8) if index not in mask]
    assert mask
    assert prices[list(mask)].max() <= prices[kept].min()


def test_a_killed_run_continues_with_the_same_numbers(config, folder, rows, monkeypatch):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: 2 * len(whole) // 3])
    overfitting(config, folder)
    assert {row.key: row.loss for row in StudyRow.read(folder / FILE)} == {
        row.key: row.loss for row in rows
    }

    def searched(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr("experiments.studies.evaluation.Search.choose", searched)
    overfitting(config, folder)
    orders = {(row.tokens, row.seed): row.evaluations for row in rows}
    assert RunFolder(folder).read()["evaluations"] == sum(orders.values())


def test_more_sizes_may_be_added_but_not_another_search(config, folder, rows):
    more = replace(config.overfitting, windows=[2, 3, 4, 8], most_windows=None, seeds=[0])
    overfitting(replace(config, overfitting=more), folder)
    assert len(StudyRow.read(folder / FILE)) == len(rows) + 2 * 2
    other = replace(config, importance=replace(config.importance, gsi_method="exact"))
    with pytest.raises(ExperimentError, match=r"importance\.gsi_method"):
        overfitting(other, folder)


def test_the_table_sets_both_losses_side_by_side():
    def row(tokens: int, seed: int, seen: float, losses: list[float]) -> StudyRow:
        return StudyRow(
            "overfitting", "gsi", "calibration", seed, tokens,
            {"batch_size": 1, "seq_len_tokens": 16}, 0.8, 10, 9, [], seen, "report",
            float(np.mean(losses)), 0.0, 0.0, losses, 5,
        )  # fmt: skip

    _, lines = gap_table(
        [row(8, 0, 0.1, [1.0, 1.0]), row(8, 1, 0.3, [1.0, 1.0]), row(32, 0, 0.5, [0.6, 0.6])]
    )
    assert [line[1:3] for line in lines] == [["8", "2"], ["32", "1"]]
    assert lines[0][3:] == ["0.200", "1.000 [1.000, 1.000]", "+0.800", "+0.400 [+0.400, +0.400]"]
    assert lines[1][5:] == ["+0.100", "-"]


def test_invalid_settings_are_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match=r"overfitting\.cells needs an entry"):
        overfitting(replace(config, overfitting=OverfittingConfig(cells=[])), tmp_path)
    with pytest.raises(ExperimentError, match=r"overfitting\.windows must have at least one entry"):
        OverfittingConfig(windows=[])
    with pytest.raises(ExperimentError, match=r"overfitting\.most_windows must be at least 1"):
        OverfittingConfig(most_windows=0)
