"""The study of prompts: a policy by text beside a blind one, on a tiny model with real kinds."""

from dataclasses import replace

import pytest

from experiments.comparison.result_rows import RecordedPlans
from experiments.config.common import ModelConfig, TextConfig
from experiments.config.study_settings import PromptsConfig
from experiments.studies.prompts import BLIND, STUDY, PolicyRow, prompt_jobs, prompt_tables
from experiments.study.console import ExperimentError
from experiments.study.json_records import append_record
from rap_env.importance.text_kinds import KindCosts, TextKinds
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tests.experiments.letter_texts import write_letters
from tests.experiments.synthetic_records import DEPENDS, make_row
from tests.experiments.tiny_study import tiny_study
from tests.policies.test_knapsack import costs

LETTERS = {"few": "abcde ", "many": "FGHIJKLMNOP"}


@pytest.fixture(scope="module")
def config(base):
    study = tiny_study(base, layers=3, stage="prompts")
    texts, seen = {}, {}
    for name, letters in LETTERS.items():
        path = write_letters(base, name, letters)
        texts[name] = TextConfig(path, windows=3, window_tokens=48)
    llm = load_llm(study.model.name, device="cpu", dtype="float32")
    memory = MemoryModel(llm)
    for name, text in texts.items():
        corpus = CorpusConfig(text.source, 6, 48, role="calibration")
        seen[name] = load_corpus(corpus, llm).tokens.numpy()
    made = {name: costs(memory.facts, seed) for seed, name in enumerate(texts)}
    KindCosts(TextKinds.of(seen, llm.facts.vocab_size), made).save(base / "kinds.json")
    made["few"].save(base / "few.json")
    budget = Request.at_fraction(memory, 2, 40, 0.7).budget_bytes
    policies = [str(base / "few.json"), str(base / "kinds.json")]
    return replace(study, prompts=PromptsConfig(policies, texts, 16, [f"2x40@{budget}"]))


@pytest.fixture(scope="module")
def rows(config):
    return PolicyRow.read(STUDY.run(config, config.stage_dir("prompts")))


def test_each_window_is_measured_with_the_plan_of_its_prompt(config, rows):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    blind, by_text = (load_policy(path, llm) for path in config.prompts.policies)
    request = Request(2, 40, int(config.prompts.cells[0].split("@")[1]))
    assert len(rows) == 6
    for row in rows:
        text = config.prompts.texts[row.text]
        corpus = load_corpus(CorpusConfig(text.source, 3, 48, role="report"), llm)
        scorer = PlanScorer(llm, corpus)
        for window, tokens in enumerate(corpus.tokens.tolist()):
            policy, shares = blind, ()
            if row.policy.endswith(BLIND):
                policy = by_text
            elif row.policy == config.prompts.policies[1]:
                shares = by_text.text_kinds.shares(tokens[:16])
                policy = by_text.for_text(shares)
                assert shares[list(LETTERS).index(row.text)] > 0.8
            plan = policy.choose(request)
            rise = scorer.window_nll(plan) - scorer.window_nll(policy.choose(
                replace(request, budget_bytes=10**9)))  # fmt: skip
            assert row.window_delta_nll[window] == pytest.approx(rise[window], abs=1e-6)


def test_tables_compare_with_the_first_policy(config, rows):
    assert (config.stage_dir("prompts") / "tables.md").read_text() == STUDY.markdown(rows)
    first, second = config.prompts.policies
    windows = {first: [1.0, 2.0, 3.0], second: [0.5, 1.0, 1.5]}
    halved = [replace(r, window_delta_nll=windows.get(r.policy, [4.0] * 3)) for r in rows]
    losses, relative = ({line[0]: line[1:] for line in t.table[1]} for t in prompt_tables(halved))
    assert [line[0] for line in losses.values()] == ["2.000", "1.000", "4.000"]
    assert set(relative[f"{second} / {first}"]) == {"-50.0 % [-50.0, -50.0]"}


def test_wrong_settings_are_rejected(config, rows, tmp_path):
    longer = replace(config, prompts=replace(config.prompts, prompt_tokens=8))
    with pytest.raises(ExperimentError, match=r"prompts\.prompt_tokens"):
        STUDY.run(longer, config.stage_dir("prompts"))
    table = replace(config, model=ModelConfig(name="score_table:smollm2-135m"))
    with pytest.raises(ExperimentError, match="needs a live model"):
        list(prompt_jobs(table, tmp_path))
    with pytest.raises(ExperimentError, match="needs texts and cells"):
        list(prompt_jobs(replace(config, prompts=PromptsConfig()), tmp_path))


def test_recorded_plans_of_another_method_are_measured_too(config, rows, tmp_path):
    llm = load_llm(config.model.name, device="cpu", dtype="float32")
    request = Request(2, 40, int(config.prompts.cells[0].split("@")[1]))
    row = make_row("gsi", (2, 40), 0.7)
    depends_on = {**DEPENDS, "model_fingerprint": llm.facts.fingerprint}
    row = replace(
        row, budget_bytes=request.budget_bytes, mask=["layer00.ffn", "layer01.ffn"],
        provenance={"depends_on": depends_on},
    )  # fmt: skip
    append_record(tmp_path / "results.jsonl", row.to_record())
    changed = replace(
        config, name="recorded", prompts=replace(config.prompts, recorded={"gsi": str(tmp_path)})
    )
    read = PolicyRow.read(STUDY.run(changed, changed.stage_dir("prompts")))
    measured = [row for row in read if row.policy == "gsi"]
    assert {row.text for row in measured} == set(LETTERS)
    assert all(other.recorded for other in measured)
    names = [line[0] for line in prompt_tables(read)[1].table[1]]
    assert names[0] == f"{config.prompts.policies[1]} / {config.prompts.policies[0]}"
    assert f"{config.prompts.policies[0]} / gsi" in names
    with pytest.raises(ExperimentError, match="no plans of beam for this model"):
        RecordedPlans("beam", str(tmp_path), llm.facts.fingerprint)
