"""Replays on server processes: a fake of llama.cpp's server, and ``rap serve`` itself (slow)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.model import ModelConfig
from experiments.config.servers import ServerReplayConfig
from experiments.config.serving import ReplayConfig
from experiments.errors import ExperimentError
from experiments.server_replay.study import STUDY
from experiments.server_replay.systems import LlamaDeployment
from experiments.study.records import read_records
from rap_env.errors import RapError
from tests.experiments.server_replay.fake_llama_server import BYTES_PER_TOKEN
from tests.serving.tokenizers import byte_llm, byte_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FAKE = Path(__file__).with_name("fake_llama_server.py")
MIB = 2**20


def mergeable_tokenizer():
    """The tokenizer of bytes with one merge: a GGUF file cannot have none."""
    tokenizer = byte_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"]["ĠĠ"] = 257
    described["model"]["merges"] = [["Ġ", "Ġ"]]
    backend = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def config(base):
    """Six requests within 0.25 s, the first of which is longer than a small context."""
    byte_llm().model.save_pretrained(base / "model")
    mergeable_tokenizer().save_pretrained(base / "model")
    (base / "story.txt").write_text("Some words to cut prompts from. " * 40)
    program = base / "llama-server"
    program.write_text(f"#!{sys.executable} -IS\n{FAKE.read_text()}")
    program.chmod(0o755)
    lines = [f"2023-11-16 18:00:{n / 20:09.6f},{(300, 20, 30)[n % 3]},{4 + n}" for n in range(6)]
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    (base / "trace.csv").write_text("\n".join([head, *lines, ""]))
    return Config(
        stage="server_replay", name="tiny", runs_dir=str(base / "runs"), progress=False, store=None,
        model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
        replay=ReplayConfig(
            trace=str(base / "trace.csv"), minutes=1, every=1, time_scale=1.0, token_scale=1.0,
            max_prompt_tokens=300, max_new_tokens=16, known_share=0.0,
            text=TextConfig(source=str(base / "story.txt"), windows=4, window_tokens=100),
        ),
        server_replay=ServerReplayConfig(
            systems=["llama_f16", "llama_q8_0"], budgets=["1GiB", "45MiB", "1MiB"],
            llama_server=str(program), slots=4, spare_mib=0.0, timeout_s=20.0, max_starts=3,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config):
    return STUDY.run(config, config.stage_dir("server_replay"))


@pytest.fixture(scope="module")
def rows(folder):
    return STUDY.read(folder)


def test_each_budget_has_every_system_in_an_order_that_is_reversed_each_time(rows):
    systems = ["llama_f16", "llama_q8_0"]
    assert [row.system for row in rows] == [*systems, *systems[::-1], *systems]


def test_a_large_budget_takes_one_start_and_serves_every_request(rows):
    row = rows[0]
    assert (row.context_tokens, row.trial_starts) == (1280, 1)  # 4 slots of 304 tokens, rounded up
    assert row.outcomes == {"served": 6}
    assert row.peak_bytes > row.context_tokens * BYTES_PER_TOKEN
    assert row.samples > 5
    assert row.samples_over == 0
    assert row.model_bytes == pytest.approx(12.5 * MIB + 1280 * BYTES_PER_TOKEN, abs=MIB / 100)
    assert len(row.ttft_s) == len(row.tpot_s) == 6
    assert 0 < min(row.ttft_s) <= max(row.ttft_s) < 20


def test_a_small_budget_gets_the_largest_context_within_it_and_rejects_what_does_not_fit(
    folder, rows
):
    row = rows[3]
    assert 256 <= row.context_tokens < 1280
    found = next(
        deployment for deployment in LlamaDeployment.read(folder)
        if (deployment.cache, deployment.budget_bytes) == ("f16", 45 * MIB)
    )  # fmt: skip
    assert len(found.trials) == row.trial_starts == 3
    fits = {int(tokens) for tokens, peak in found.trials.items() if peak <= 45 * MIB}
    assert row.context_tokens == max(fits)
    assert row.outcomes.keys() <= {"served", "refused"}
    assert sum(row.outcomes.values()) == 6


def test_a_budget_below_the_smallest_context_is_a_row_that_says_so(rows):
    row = rows[4]
    assert row.startup_error.startswith("llama.cpp's server with a cache in f16 takes ")
    assert (row.outcomes, row.samples, row.losses) == ({"refused": 6}, 0, [])


def test_answers_are_judged_by_the_dense_model(folder, rows):
    assert len(rows[0].losses) == 6
    assert 0 <= rows[0].same_fraction <= 1
    assert len(read_records(folder / "references.jsonl")) == 6


def test_rows_are_not_measured_again_and_hold_no_paths(config, folder, rows):
    before = (folder / "server_replay.jsonl").read_bytes()
    STUDY.run(replace(config, server_replay=replace(
        config.server_replay, systems=["llama_f16"], budgets=["1GiB"])), folder)  # fmt: skip
    assert (folder / "server_replay.jsonl").read_bytes() == before
    kept = [{**row.to_record(), "provenance": row.depends_on} for row in rows]
    assert str(folder.parent) not in json.dumps(kept)


def test_tables_have_a_line_for_each_system_and_the_reason_of_each_that_did_not_start(rows):
    text = STUDY.markdown(rows)
    assert text.count("| llama.cpp, f16 cache |") == 7  # three tables thrice; one did not start
    assert "version 1234 (abcdef)" in text
    assert "with its smallest context" in text
    assert "6 requests of trace.csv" in text


def test_a_missing_program_is_reported_before_the_model_is_loaded(config, tmp_path):
    settings = replace(config.server_replay, llama_server="no-such-server")
    nothing = replace(config, server_replay=settings, model=ModelConfig(name="nothing"))
    with pytest.raises(ExperimentError, match=r"'no-such-server' was not found; .*pip install"):
        STUDY.run(nothing, tmp_path)


def test_a_budget_that_is_no_size_is_rejected():
    with pytest.raises(RapError, match="budgets must be a number of bytes such as 2.5GiB"):
        ServerReplayConfig(budgets=["much"])


@pytest.mark.slow
def test_our_own_server_is_replayed_and_says_if_its_memory_does_not_suffice(config, tmp_path):
    settings = replace(
        config.server_replay, systems=["rap", "rap_model_memory"], budgets=["1GiB", "1MiB"]
    )
    rows = STUDY.read(STUDY.run(replace(config, server_replay=settings), tmp_path))
    assert [(row.system, row.outcomes.get("served", 0)) for row in rows] == [
        ("rap", 6), ("rap_model_memory", 6), ("rap_model_memory", 0), ("rap", 0),
    ]  # fmt: skip
    assert rows[0].samples_over == 0
    assert rows[1].options[:2] == ["--model-memory", str(rows[1].model_bytes)]
    assert "memory is 1MiB, but the process needs" in rows[3].startup_error
