"""The study of long contexts on a tiny real model: rows of all plans, losses by hand, tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from experiments.config import Config
from experiments.config.common import ImportanceConfig, ModelConfig, TextConfig
from experiments.config.study_settings import LengthsConfig, LongContextConfig
from experiments.contexts import build_context
from experiments.studies.long_context import DOCUMENTS, STUDY, compared_lengths, documents_of
from experiments.study.console import ExperimentError
from experiments.study.statistics import wilson_interval
from rap_env.errors import CorpusError, UnknownNameError
from rap_env.plan import Plan
from rap_env.scoring.generated_tasks import NAMES, OBJECTS
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.tasks import TaskScorer
from tests.scoring.test_long_context_tasks import word_llm

CACHES = ["native", "int4", "int2", "window128"]


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(base):
    llm = word_llm()
    llm.model.set_attn_implementation("sdpa")
    llm.model.save_pretrained(base / "model")
    llm.tokenizer.save_pretrained(base / "model")
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice([*NAMES, *OBJECTS], size)) for size in (900, 300, 40)]
    write_rows(base / "documents.jsonl", [{"context": document} for document in documents])
    return Config(
        stage="long_context", name="tiny", runs_dir=str(base / "runs"), progress=False,
        model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
        calibration=TextConfig(source="self", windows=2, window_tokens=40),
        importance=ImportanceConfig(method="none"),
        long_context=LongContextConfig(
            caches=CACHES, policies=["greedy_per_byte"], budgets=[0.9], batch_size=2,
            tasks={"recall": LengthsConfig([512, 768], 16), "counting": LengthsConfig([512], 6)},
            documents=[TextConfig(source=str(base / "documents.jsonl"), field="context",
                                  windows=2, window_tokens=300)],
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config):
    rows = STUDY.read(STUDY.run(config, config.stage_dir("long_context")))
    return {(row.plan, row.measure, row.length): row for row in rows}


def test_every_plan_has_a_row_of_each_measure(rows):
    plans = [*CACHES, "greedy_per_byte 90 %"]
    measures = [("recall", 512), ("recall", 768), ("counting", 512), (DOCUMENTS, 300)]
    assert list(rows) == [(plan, *measure) for measure in measures for plan in plans]
    lowered = rows["int4", "recall", 512].depends_on["plan"]
    assert lowered == {"layer00.cache": "int4", "layer01.cache": "int4"}
    searched = rows["greedy_per_byte 90 %", "recall", 768]
    assert set(searched.depends_on["plan"].values()) == {"removed"}
    assert searched.peak_bytes <= 0.9 * searched.native_peak_bytes


def test_right_answers_are_those_of_the_task(rows, config):
    llm = build_context(config).llm
    for length in (512, 768):
        name = f"rap_recall_{length}"
        scorer = TaskScorer(llm, TaskConfig((name,), limit=16, seed=config.seed))
        assert scorer.chance[name] == 0.25
        for caches in CACHES:
            right = scorer.right_answers(Plan.uniform(2, caches=caches))[name]
            assert rows[caches, "recall", length].values == right.tolist()
    assert len(rows["native", "counting", 512].values) == 6


def test_losses_on_documents_are_those_of_the_model(rows, config):
    row = rows["native", DOCUMENTS, 300]
    llm = build_context(config).llm
    tokens = documents_of(llm, config.long_context.documents[0]).tokens
    assert tokens.shape == (2, 300)
    with torch.no_grad():
        logs = llm.model(tokens).logits.log_softmax(-1)
    nll = -logs[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0].numpy()
    assert row.values == pytest.approx(nll.mean(axis=1), abs=1e-4)
    assert rows["window128", DOCUMENTS, 300].values != pytest.approx(row.values, abs=1e-4)


def test_tables_name_every_plan(rows, config):
    text = STUDY.markdown(list(rows.values()))
    assert text == (config.stage_dir("long_context") / "tables.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Loss and recall", "## Recall", "## Most common words"]
    right = rows["int2", "recall", 512].values
    low, high = wilson_interval(np.mean(right), len(right))
    assert f"| int2 | {100 * np.mean(right):.0f} % [{100 * low:.0f}, {100 * high:.0f}]" in text


def test_the_summary_of_recall_takes_the_lengths_that_all_tasks_have(rows):
    row = rows["native", "recall", 512]

    def lengths(**kinds):
        return compared_lengths(
            [
                replace(row, measure=kind, length=length)
                for kind, every in kinds.items()
                for length in every
            ]
        )

    both = lengths(recall=[512, 1024, 2048, 8192], tracking=[512, 1024, 2048])
    assert both == [1024, 2048]
    assert lengths(recall=[4096], tracking=[2048]) == [2048, 4096]
    assert lengths(counting=[512]) == [512]
    assert lengths(recall=[256, 512], counting=[1024]) == [256, 512]


def test_wrong_settings_and_documents_are_named(config):
    llm = build_context(config).llm
    text = config.long_context.documents[0]
    with pytest.raises(CorpusError, match="has 1 documents of at least 800 tokens, but 2 are"):
        documents_of(llm, replace(text, window_tokens=800))
    with pytest.raises(CorpusError, match="lacks the field 'passage'"):
        documents_of(llm, replace(text, field="passage"))
    with pytest.raises(UnknownNameError, match="kind of long_context.tasks 'recal'"):
        LongContextConfig(tasks={"recal": LengthsConfig()})
    with pytest.raises(ExperimentError, match=r"tasks\.recall\.lengths must be .* at least 512"):
        Config(long_context=LongContextConfig(tasks={"recall": LengthsConfig([256])}))
