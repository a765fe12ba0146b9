"""The study of kinds of text on a tiny real model: masks, gain, resuming, rejected settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agents.baselines import GreedyPerByteBaseline
from agents.baselines.base import fits, measure_choice
from experiments.comparison.run_folder import RunFolder
from experiments.comparison.statistics import paired_difference
from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.model import ImportanceConfig, ModelConfig
from experiments.config.studies import TextStudyConfig
from experiments.errors import ExperimentError
from experiments.studies.records import StudyRow
from experiments.studies.text_study import (
    FILE,
    OTHERS,
    SHARED,
    SHARED_ALL,
    LazyPerByteBaseline,
    TextComparison,
    searched_texts,
    text_study,
)
from rap_env.blocks import BlockMask
from rap_env.context.live import LiveContext
from rap_env.errors import CorpusError, UnknownNameError
from rap_env.llm.loading import load_llm
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig, ensure_disjoint
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.agents.synthetic import SyntheticScorer, facts
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer

CELLS = ["1x16@0.8", "2x32@0.7"]
TOKENS = 36


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("text_study")
    tiny_model(layers=4).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    for name, letters in (("few", "abc ."), ("many", "defghijklmnopqrstuvwxyz ,")):
        drawn = np.random.default_rng(len(letters)).choice(list(letters), 2400)
        (base / f"{name}.py").write_text("".join(drawn))
    texts = {
        name: TextConfig(source=str(base / f"{name}.py"), windows=3, window_tokens=TOKENS)
        for name in ("few", "many")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="text_study", name="tiny", runs_dir=str(base / "runs"), progress=False,
            store=str(base / "scores.sqlite"),
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source="self", windows=1, window_tokens=12),
            importance=ImportanceConfig(gsi_removals=3),
            evaluate=EvaluateConfig(),
            text_study=TextStudyConfig(texts=texts, cells=CELLS, report_windows=4),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config):
    text_study(config, config.stage_dir("text_study"))
    return config.stage_dir("text_study")


@pytest.fixture(scope="module")
def rows(folder):
    return StudyRow.read(folder / FILE)


def test_every_mask_is_evaluated_on_every_kind_of_text(rows):
    found = {(row.searched_on, row.cell, row.text) for row in rows}
    cells = [(1, 16, 0.8), (2, 32, 0.7)]
    searched = ["few", "many", SHARED, SHARED_ALL]
    assert found == {(s, cell, t) for s in searched for cell in cells for t in ("few", "many")}
    assert len(rows) == len(found)


def test_a_shared_text_has_a_part_of_every_kind_and_the_tokens_of_one(config, rows):
    tokens = {row.searched_on: row.tokens for row in rows}
    assert tokens == {
        "few": 3 * TOKENS, "many": 3 * TOKENS, SHARED: 3 * TOKENS, SHARED_ALL: 6 * TOKENS
    }  # fmt: skip
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    kinds = {
        name: load_corpus(CorpusConfig(**vars(text)), llm)
        for name, text in config.text_study.texts.items()
    }
    shared = searched_texts(kinds, config.text_study)[SHARED].tokens
    of_kind = {name: {tuple(w) for w in text.tokens.tolist()} for name, text in kinds.items()}
    windows = [tuple(window) for window in shared.tolist()]
    assert sum(window in of_kind["few"] for window in windows) == 2
    assert sum(window in of_kind["many"] for window in windows) == 1


def test_a_kinds_mask_is_what_the_search_finds_on_its_calibration_text(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    text = CorpusConfig(**vars(config.text_study.texts["few"]))
    search = GreedyPerByteBaseline(LiveContext(llm, load_corpus(text, llm), progress=False))
    report = load_corpus(replace(text, role="report", windows=4), llm)
    ensure_disjoint(load_corpus(text, llm), report)
    scorer = MaskScorer(llm, report)
    for row in rows:
        if row.searched_on == "few" and row.text == "few":
            request = Request(*row.cell[:2], row.budget_bytes)
            choice = measure_choice(search, request, search.scorer)
            assert row.mask == list(choice.plan.names)
            assert row.evaluations == choice.evaluations
            loss = scorer.nll(BlockMask.of(*row.mask)) - scorer.dense_nll
            assert row.loss == pytest.approx(loss, abs=1e-6)
        assert row.peak_bytes <= row.budget_bytes


def test_a_killed_run_searches_only_missing_cells(config, folder, rows, monkeypatch):
    whole = (folder / FILE).read_bytes().splitlines(keepends=True)
    (folder / FILE).write_bytes(b"".join(whole[:-2]) + whole[-2][:50])
    text_study(config, folder)
    assert {row.key: row.loss for row in StudyRow.read(folder / FILE)} == {
        row.key: row.loss for row in rows
    }

    def searched(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr("experiments.studies.evaluation.Search.choose", searched)
    text_study(config, folder)
    evaluations = {(row.searched_on, row.cell): row.evaluations for row in rows}
    assert RunFolder(folder).read()["evaluations"] == sum(evaluations.values())
    assert "Effect of a mask for the kind of text" in (folder / "tables.md").read_text()


def synthetic(losses: dict[tuple[str, str], list[float]]) -> TextComparison:
    """Rows with one cell whose losses are given by (searched on, kind)."""
    return TextComparison([
        StudyRow("text", "m", searched_on, 0, 8, {"batch_size": 1, "seq_len_tokens": 16}, 0.8,
                 10, 9, [], 0.0, kind, float(np.mean(values)), 0.0, 0.0, values, 1)
        for (searched_on, kind), values in losses.items()
    ])  # fmt: skip


def test_the_gain_is_the_paired_difference_of_own_and_other_masks():
    found = synthetic({
        ("a", "a"): [1.0, 2.0], ("a", "b"): [5.0, 5.0], ("b", "a"): [3.0, 4.0],
        ("b", "b"): [2.0, 2.5], (SHARED, "a"): [1.5, 2.5], (SHARED, "b"): [2.5, 3.0],
    })  # fmt: skip
    assert found.rivals == [SHARED, OTHERS]
    own_a = found.gain(SHARED, ["a"])
    assert (own_a.mean, own_a.low, own_a.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert found.gain(OTHERS, ["a"]).mean == pytest.approx(1.5 - 3.5)
    everything = found.gain(OTHERS, ["a", "b"])
    expected = paired_difference([1.5, 2.25], [4.0, 4.5])  # means over kinds, window by window
    assert (everything.mean, everything.low) == pytest.approx((expected.mean, expected.low))
    assert f"against {SHARED}: a gain (-0.500" in found.verdict()


def test_the_answer_is_no_if_masks_are_equal():
    same = [1.0, 2.0, 3.0]
    found = synthetic({(s, k): same for s in ("a", "b", SHARED) for k in ("a", "b")})
    assert f"against {SHARED}: no significant gain (+0.000" in found.verdict()
    worse = synthetic({
        (s, k): [2.0, 2.0] if s == k else [1.0, 1.0]
        for s in ("a", "b", SHARED) for k in ("a", "b")
    })  # fmt: skip
    assert ": a disadvantage (+1.000" in worse.verdict()


def test_the_lazy_search_finds_what_the_whole_one_finds_with_fewer_evaluations(tmp_path):
    llm = tiny_llm(layers=12)
    text = load_corpus(
        CorpusConfig(source=str(_letters(tmp_path)), windows=2, window_tokens=32),
        tiny_llm(layers=12, tokenizer=tiny_tokenizer()),
    )
    whole = GreedyPerByteBaseline(LiveContext(llm, text, progress=False))
    lazy = LazyPerByteBaseline(LiveContext(llm, text, progress=False))
    request = Request.at_fraction(lazy.memory, 1, 32, 0.7)
    one, two = (measure_choice(by, request, by.scorer) for by in (whole, lazy))
    assert fits(lazy.memory, two.plan, request)
    assert two.evaluations < 0.8 * one.evaluations
    scorer = MaskScorer(llm, text)
    dense = scorer.dense_nll
    # Random weights are no language model: losses often fall as blocks go. It may miss a little.
    assert scorer.nll(two.plan) - dense <= 1.1 * abs(scorer.nll(one.plan) - dense) + 0.05


def test_the_lazy_search_is_exact_if_losses_are_additive():
    costs = np.random.default_rng(3).uniform(0.01, 0.4, 24)
    parts = type("Parts", (), {"memory": MemoryModel(facts(12)), "one_shot": None, "gsi": None})
    parts.scorer = SyntheticScorer(costs)
    whole, lazy = GreedyPerByteBaseline(parts()), LazyPerByteBaseline(parts())
    for fraction in (0.95, 0.8, 0.6):
        request = Request.at_fraction(lazy.memory, 2, 64, fraction)
        one, two = (measure_choice(by, request, by.scorer) for by in (whole, lazy))
        assert two.plan == one.plan
        assert two.evaluations < one.evaluations or len(one.plan) == 1
    dense = measure_choice(lazy, Request.at_fraction(lazy.memory, 2, 64, 1.0), lazy.scorer)
    assert (len(dense.plan), dense.evaluations) == (0, 0)


def _letters(folder):
    path = folder / "letters.txt"
    path.write_text("".join(np.random.default_rng(1).choice(list("abcdefgh "), 600)))
    return path


def test_incomparable_inputs_are_rejected(config, tmp_path):
    settings = config.text_study

    def refused(match: str, error: type[Exception] = ExperimentError, **changes: object) -> None:
        other = replace(config, text_study=replace(settings, **changes))
        with pytest.raises(error, match=match):
            text_study(other, tmp_path / "refused")

    refused("two kinds", texts={"few": settings.texts["few"]})
    refused("names other than 'shared'", texts={"few": settings.texts["few"],
                                                SHARED: settings.texts["many"]})  # fmt: skip
    refused("needs a cell", cells=[])
    refused("same windows", texts={"few": settings.texts["few"],
                                   "many": replace(settings.texts["many"], windows=2)})  # fmt: skip
    one = {name: replace(text, windows=1) for name, text in settings.texts.items()}
    refused("as many windows", texts=one)
    refused("lazy_per_bite", UnknownNameError, method="lazy_per_bite")
    refused("enough for", CorpusError, report_windows=1000)
    assert not (tmp_path / "refused" / FILE).exists()
