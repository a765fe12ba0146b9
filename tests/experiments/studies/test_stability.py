"""The study of stability on a tiny real model: orders, agreement, masks, agents, resumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.evaluation import EvaluateConfig
from experiments.config.model import ImportanceConfig, ModelConfig
from experiments.config.studies import StabilityConfig
from experiments.config.training import AgentConfig
from experiments.errors import ExperimentError
from experiments.studies.records import OrderRow, StudyRow
from experiments.studies.stability import (
    FILE,
    ORDERS,
    OWN_TEXT,
    agreements,
    kendall_tau,
    overlap,
    stability,
)
from experiments.train import train
from rap_env.blocks import BlockMask, block_name
from rap_env.errors import CorpusError
from rap_env.llm.loading import load_llm
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.tiny import tiny_model, tiny_tokenizer


def story() -> str:
    """Text whose parts differ, so that no two roles share a run of tokens."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz ,."), 2400)
    return "".join(letters)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("stability")
    tiny_model(layers=4).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    (base / "story.txt").write_text(story())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        yield Config(
            stage="stability", name="tiny", runs_dir=str(base / "runs"), progress=False,
            store=str(base / "scores.sqlite"),
            model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
            calibration=TextConfig(source="self", windows=2, window_tokens=12, seed=9),
            importance=ImportanceConfig(gsi_removals=4, gsi_method="lazy"),
            workload={"name": "grid", "batch_sizes": [1, 2], "seq_lens_tokens": [16],
                      "budget_fractions": [0.9, 0.7]},
            reward={"name": "perplexity"},
            evaluate=EvaluateConfig(
                requests=["1x16"], budgets=[0.8],
                text=TextConfig(source="self", windows=3, window_tokens=12),
            ),
            stability=StabilityConfig(
                texts={
                    "self": TextConfig(source="self", windows=2, window_tokens=12),
                    "story": TextConfig(
                        source=str(base / "story.txt"), windows=2, window_tokens=36
                    ),
                },
                seeds=[0, 1], top=[2, 4, 6], cells=["1x16@0.8", "2x32@0.7"],
            ),
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config):
    stability(config, config.stage_dir("stability"))
    return config.stage_dir("stability")


def test_every_draw_of_every_text_has_both_orders(folder):
    orders = OrderRow.read(folder / ORDERS)
    draws = {(text, seed) for text in ("self", "story") for seed in (0, 1)}
    for method in ("one_shot", "gsi"):
        assert {(o.searched_on, o.seed) for o in orders if o.method == method} == draws
    assert all(len(order.order) == len(set(order.order)) == 8 for order in orders)
    assert {order.measured for order in orders if order.method == "gsi"} == {4}
    assert {order.evaluations for order in orders if order.method == "one_shot"} == {9}


def test_importance_is_the_loss_without_the_block_on_that_text(config, folder):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    for order in OrderRow.read(folder / ORDERS):
        if (order.method, order.searched_on, order.seed) == ("one_shot", "story", 1):
            text = replace(config.stability.texts["story"], seed=1)
            scorer = MaskScorer(llm, load_corpus(CorpusConfig(**vars(text)), llm))
            rises = [scorer.nll(BlockMask.of(index)) - scorer.dense_nll for index in range(8)]
            assert order.values == pytest.approx(rises, abs=1e-6)
            assert order.order[0] == block_name(int(np.argmin(rises)))
            return
    raise AssertionError("the order is missing")


def test_masks_are_evaluated_on_one_report_text_at_equal_bytes(config, folder):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    text = CorpusConfig(**vars(config.evaluate.text), role="report")
    scorer = MaskScorer(llm, load_corpus(text, llm))
    rows = StudyRow.read(folder / FILE)
    assert len(rows) == 2 * 2 * 2 * 2  # methods, texts, seeds, cells
    for row in rows:
        assert row.peak_bytes <= row.budget_bytes
        loss = scorer.nll(BlockMask.of(*row.mask)) - scorer.dense_nll
        assert row.loss == pytest.approx(loss, abs=1e-6)
        assert len(row.window_losses) == 3
    assert len({row.budget_bytes for row in rows}) == 2


def test_masks_follow_their_order(folder):
    orders = {(o.method, o.searched_on, o.seed): o for o in OrderRow.read(folder / ORDERS)}
    for row in StudyRow.read(folder / FILE):
        order = orders[row.method, row.searched_on, row.seed]
        assert set(row.mask) == set(order.order[: len(row.mask)])
        assert row.evaluations == order.evaluations


def test_a_killed_run_continues_with_the_same_numbers(config, folder, monkeypatch):
    before = {row.key: (row.loss, row.mask) for row in StudyRow.read(folder / FILE)}
    rows, orders = (folder / FILE).read_bytes(), (folder / ORDERS).read_bytes()
    (folder / FILE).write_bytes(rows[: len(rows) // 2])  # in the middle of a line
    (folder / ORDERS).write_bytes(b"".join(orders.splitlines(keepends=True)[:-1]))
    stability(config, folder)
    assert {r.key: (r.loss, r.mask) for r in StudyRow.read(folder / FILE)} == before
    assert len(OrderRow.read(folder / ORDERS)) == len(orders.splitlines())

    def measured(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("experiments.studies.evaluation.StudyEvaluator._row", measured)
    monkeypatch.setattr("experiments.studies.stability._measured", measured)
    stability(config, folder)


def test_a_policy_observes_the_importance_of_each_text(config, folder):
    trained = replace(
        config, stage="train", name="agents",
        agent=AgentConfig(name="maskable_ppo", total_timesteps=64, n_envs=2,
                          hyperparameters={"n_steps": 16, "batch_size": 16}),
    )  # fmt: skip
    run = trained.stage_dir("train") / "maskable_ppo-s0"
    train(trained, run)
    settings = replace(config.stability, agents=[str(run)])
    again = stability(replace(config, stability=settings), folder)
    rows = [row for row in StudyRow.read(again) if row.method == "maskable_ppo-s0"]
    shown = {(row.searched_on, row.seed) for row in rows}
    assert shown == {("self", 0), ("self", 1), ("story", 0), ("story", 1), (OWN_TEXT, 9)}
    assert all(row.peak_bytes <= row.budget_bytes and row.evaluations == 0 for row in rows)
    hashes = {row.provenance["depends_on"]["calibration_sha256"] for row in rows}
    assert len(hashes) == 5


def test_the_run_records_its_cost_and_writes_tables(config, folder):
    facts = RunFolder(folder).read()
    orders = OrderRow.read(folder / ORDERS)
    assert facts["evaluations"] == sum(order.evaluations for order in orders)
    tables = (folder / "tables.md").read_text()
    assert "same text, other draw" in tables
    assert "story - self" in tables


def test_kendalls_tau_has_its_known_values():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # scipy.stats.kendalltau(...).statistic, whose default is tau-b
    assert kendall_tau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.4714045207910316)
    assert kendall_tau([1, 2, 3, 4, 5], [3, 1, 2, 5, 4]) == pytest.approx(0.4)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="one length"):
        kendall_tau([1, 2], [1, 2, 3])


def test_overlap_counts_common_first_blocks_in_any_order():
    assert overlap(["a", "b", "c"], ["b", "a", "d"], 2) == 1
    assert overlap(["a", "b", "c"], ["c", "d", "a"], 2) == 0
    assert overlap(["a", "b", "c", "d"], ["c", "e", "a", "f"], 4) == 0.5


def test_only_orders_of_one_method_are_compared_and_only_as_far_as_both_go():
    def order(method: str, text: str, measured: int) -> OrderRow:
        return OrderRow(method, text, 0, 8, ["a", "b", "c"], measured, [0, 1, 2], 3)

    pairs = list(
        agreements([order("gsi", "x", 3), order("gsi", "y", 2), order("one_shot", "x", 3)], [1, 3])
    )
    assert [(pair.method, pair.texts, pair.overlaps) for pair in pairs] == [
        ("gsi", ("x", "y"), {1: 1.0})
    ]
    assert not pairs[0].same_text


def test_incomparable_inputs_are_rejected(config, tmp_path):
    with pytest.raises(ExperimentError, match=r"stability\.texts needs an entry"):
        stability(replace(config, stability=StabilityConfig()), tmp_path / "none")
    table = replace(config, model=ModelConfig(name="score_table:some/table.json"))
    with pytest.raises(ExperimentError, match="scores of one"):
        stability(table, tmp_path / "table")
    agents = replace(config.stability, agents=[str(tmp_path / "nobody")])
    with pytest.raises(ExperimentError, match="no training run"):
        stability(replace(config, stability=agents), tmp_path / "agents")
    with pytest.raises(
        ExperimentError, match=r"stability\.seeds must have at least one entry and none twice"
    ):
        StabilityConfig(seeds=[1, 1])
    with pytest.raises(ExperimentError, match=r"stability\.top must be at least 1, not 0"):
        StabilityConfig(top=[0])
    with pytest.raises(ExperimentError, match="such as 8x2048@0.85"):
        StabilityConfig(cells=["8x2048"])


def test_report_text_that_was_searched_on_is_rejected(config, tmp_path):
    repeated = tmp_path / "same.txt"
    repeated.write_text("the cat sat on the mat and looked at the dog. " * 200)
    text = TextConfig(source=str(repeated), windows=2, window_tokens=36)
    other = replace(
        config,
        evaluate=EvaluateConfig(text=text),
        stability=replace(config.stability, texts={"same": text}),
    )
    with pytest.raises(CorpusError, match="share"):
        stability(other, tmp_path / "run")
