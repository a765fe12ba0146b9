from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.ladder import second_model
from rap_env.artifacts import load_artifact
from tests.tiny import tiny_llm, tiny_tokenizer


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(second_model, "TOKENS", 48)
    monkeypatch.setattr(second_model, "CALIBRATION", (2, 48))
    llm = tiny_llm("gemma3_text", tokenizer=tiny_tokenizer())
    monkeypatch.setattr(second_model, "load_llm", lambda *_, **__: llm)
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"page": "The quick brown fox. " * 20}))
    return path


def measured(text: Path, out: Path) -> dict[str, Any]:
    arguments = [str(text), "--windows", "2", "--out", str(out)]
    done = CliRunner().invoke(second_model.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return load_artifact(out, second_model.KIND, second_model.VERSION)


def test_each_level_has_a_row_with_cost_and_bytes(text: Path, tmp_path: Path) -> None:
    record = measured(text, tmp_path / "out.json")
    rows = {(r["items"], r["level"], r["quantiser"]): r for r in record["rows"]}
    assert {key[:2] for key in rows} == {
        ("weights of all blocks", "int4"),
        ("weights of all blocks", "int8"),
        ("all caches", "int8"),
        ("all caches", "int4"),
        ("all caches", "int2"),
        ("embeddings", "int8"),
        ("embeddings", "int4"),
        ("the whole model", "native"),
    }
    sizes = [row["bytes"] for key, row in rows.items() if key[1] == "int4" and "blocks" in key[0]]
    assert len(sizes) == 3  # by rounding, search and GPTQ
    assert rows["the whole model", "native", "the file's own"]["delta_nll"] == 0
    for row in rows.values():
        if row["level"] != "native":
            assert row["delta_nll"] != 0
            assert row["bytes"] > 0


def test_measured_rows_are_kept(text: Path, tmp_path: Path) -> None:
    first = measured(text, tmp_path / "out.json")
    content = (tmp_path / "out.json").read_bytes()
    assert measured(text, tmp_path / "out.json") == first
    assert (tmp_path / "out.json").read_bytes() == content
    text.write_text(json.dumps({"page": "Another text, as long as it is. " * 20}))
    assert measured(text, tmp_path / "out.json")["nll"] != first["nll"]
