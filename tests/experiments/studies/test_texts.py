"""The study of texts: real costs of a tiny model, a synthetic scorer with a known gap, resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.config.common import ModelConfig, parse_pinned
from experiments.config.program_settings import EnvConfig
from experiments.config.study_settings import TextConfig, TextsConfig
from experiments.studies import texts as program
from experiments.studies.texts import (
    ALL,
    OTHERS,
    STUDY,
    CostRow,
    PlanRow,
    agreement_table,
    gap,
    kendall_tau,
    losses_of,
    text_jobs,
)
from experiments.study.console import ExperimentError
from rap_env.errors import CorpusError, InfeasibleBudgetError
from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.items import Ladder
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.letter_texts import write_letters
from tests.experiments.tiny_study import tiny_study
from tests.tiny import tiny_llm

KINDS = ("few", "many")
LEVELS = {"weights": ["removed"], "caches": ["int4", "int2"], "embeddings": ["int4"]}


@pytest.fixture(scope="module")
def config(base):
    for name, letters in (("few", "abcde ."), ("many", "fghijklmnopqrstuvwxyz ,")):
        write_letters(base, name, letters)
    memory = MemoryModel(tiny_llm(layers=4))
    budgets = {s: memory.dense_peak_bytes(*s) * 7 // 10 for s in ((1, 16), (4, 60))}
    return tiny_study(
        base, stage="texts",
        env=EnvConfig(id="RAPLadder-v0", levels=LEVELS, together=["int4"]),
        texts=TextsConfig(
            kinds={name: TextConfig(str(base / f"{name}.txt")) for name in KINDS},
            seeds=[0, 1], windows=1, window_tokens=48, report_windows=4,
            cells=[f"{b}x{n}@{size}" for (b, n), size in budgets.items()],
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config):
    return STUDY.run(config, config.stage_dir("texts"))


def scorer_of(config, kind, seed, tokens, windows, role):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    text = CorpusConfig(config.texts.kinds[kind].source, windows, tokens, seed, role=role)
    return PlanScorer(llm, load_corpus(text, llm))


def test_costs_are_measured_on_each_draw(config, folder):
    rows = CostRow.read(folder / CostRow.file)
    assert {(row.kind, row.seed) for row in rows} == {(k, s) for k in KINDS for s in (0, 1)}
    row = next(row for row in rows if (row.kind, row.seed) == ("many", 1))
    scorer = scorer_of(config, "many", 1, 48, 1, "calibration")
    for item, level in (("layer02.cache", "int2"), ("layer01.ffn", "removed")):
        rise = scorer.nll(Plan.of({item: level})) - scorer.dense_nll
        assert row.costs["one_shot"][item][level] == pytest.approx(rise, abs=1e-6)
    assert len({json.dumps(row.costs["one_shot"]) for row in rows}) == len(rows)


def test_plans_of_the_knapsack_are_measured_on_every_kind(config, folder):
    rows = PlanRow.read(folder / PlanRow.file)
    plans = {(r.chosen_on, r.seed, r.judged_on, r.cell) for r in rows}
    assert plans == {
        (chosen_on, seed, kind, cell)
        for chosen_on in (*KINDS, ALL) for seed in (0, 1) for kind in KINDS
        for cell in config.texts.cells
    }  # fmt: skip
    assert len(rows) == len(plans)
    costs = {(r.kind, r.seed): r.costs for r in CostRow.read(folder / CostRow.file)}
    report = scorer_of(config, "many", 0, 48, 4, "report")
    memory = MemoryModel(report.llm)
    levels = {item.name: item.levels for item in Ladder.of(memory.facts, LEVELS).items}
    for row in (row for row in rows if (row.chosen_on, row.judged_on) == ("few", "many")):
        policy = KnapsackPolicy(memory, LevelCosts(**costs["few", row.seed]), levels=levels)
        pinned = parse_pinned(row.cell)
        request = Request(*pinned.shape, pinned.budget_bytes)
        plan = policy.choose(request)
        assert memory.peak_bytes(plan, request) <= request.budget_bytes
        rise = report.window_nll(plan) - report.window_nll(Plan())
        assert row.window_delta_nll == pytest.approx(rise.tolist(), abs=1e-6)


def test_tables_are_made_from_the_record(folder):
    shown = (folder / "tables.md").read_text()
    for part in ("attn removed", "cache int2", "| all |", "those from costs on one of the other"):
        assert part in shown
    assert "cache int4" not in shown, "its costs are shares of one measurement"
    kinds, losses = losses_of(STUDY.read(folder))
    assert (kinds, losses.shape) == (list(KINDS), (3, 2, 2, 2, 4))
    rows = [row for row in PlanRow.read(folder) if (row.chosen_on, row.judged_on) == (ALL, "few")]
    expected = np.mean([row.window_delta_nll for row in rows])
    assert losses[2, 0].mean() == pytest.approx(expected)


class AdditiveScorer:
    """Costs add up, and are high for the first layers on one kind, for the last on the other."""

    def __init__(self, llm, corpus, store=None):
        self.llm, self.corpus, self.evaluations, self.block_forwards = llm, corpus, 0, 0.0
        self.provenance = {"text": corpus.provenance, "scoring": {}}
        self.context = {"tokens": corpus.sha256}
        reverse = corpus.provenance["source"].endswith("many.txt")
        self.cost = 0.05 + 0.1 * (np.arange(4)[::-1] if reverse else np.arange(4))
        self.release = lambda: None

    def window_nll(self, plan):
        rise = 0.0
        for item, level in plan.levels.items():
            layer = int(item[5:7]) if item.startswith("layer") else 0
            rise += self.cost[layer] * {"removed": 1.0, "int2": 0.3, "int4": 0.1}.get(level, 0.01)
        return np.full(len(self.corpus.tokens), 1.0 + rise)

    def nll(self, plan):
        return float(self.window_nll(plan).mean())

    def nll_many(self, plans, on_score=None):
        return [self.nll(plan) for plan in plans]


def test_the_gap_is_positive_if_costs_depend_on_the_kind(config, monkeypatch):
    monkeypatch.setattr(program, "PlanScorer", AdditiveScorer)
    other = replace(config, name="apart", store=None)
    rows = STUDY.read(STUDY.run(other, other.stage_dir("texts")))
    _, losses = losses_of(rows)
    assert gap(losses, ALL).low > 0.03
    assert gap(losses, OTHERS).mean > gap(losses, ALL).mean
    by_plan = losses.mean(axis=(2, 3, 4))
    assert by_plan[0, 0] < by_plan[1, 0]
    assert by_plan[1, 1] < by_plan[0, 1]
    taus = {line[0]: line[1:] for line in agreement_table(rows)[1]}
    assert taus["attn removed"] == ["1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00]"]
    for row in rows:
        if isinstance(row, CostRow):  # draws of the same windows do not count as agreement
            row.costs["provenance"]["text"]["sha256"] = row.kind
    for _, within, between in agreement_table(rows)[1]:
        assert within == "-" != between
    alike = np.broadcast_to(losses[0, 0], losses.shape)
    assert gap(alike, ALL).mean == gap(alike, OTHERS).mean == 0


def test_kendalls_tau_has_its_known_values():
    # scipy.stats.kendalltau(...).statistic, whose default is tau-b
    assert kendall_tau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.4714045207910316)
    assert kendall_tau([1, 2, 3, 4, 5], [3, 1, 2, 5, 4]) == pytest.approx(0.4)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0


def test_impossible_settings_are_rejected(config, tmp_path):
    def refused(match, error, **changes):
        with pytest.raises(error, match=match):
            list(text_jobs(replace(config, texts=replace(config.texts, **changes)), tmp_path))

    refused("two kinds and a cell", ExperimentError, kinds={"few": config.texts.kinds["few"]})
    refused("two kinds and a cell", ExperimentError, cells=[])
    refused("Raise the budget", InfeasibleBudgetError, cells=["1x16@10"])
    refused("enough for", CorpusError, report_windows=1000)
    with pytest.raises(ExperimentError, match="needs a live model"):
        list(text_jobs(replace(config, model=ModelConfig(name="score_table:x.json")), tmp_path))
