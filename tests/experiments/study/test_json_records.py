"""Records survive kills, and damage is detected."""

from dataclasses import asdict, replace

import pytest

from experiments.comparison.result_rows import ResultRow
from experiments.study.json_records import (
    append_record,
    read_records,
    row_key,
    trim_metrics,
    write_records,
)
from rap_env.errors import ArtifactError
from tests.experiments.synthetic_records import make_row


def test_a_torn_last_line_is_removed_before_the_next_record(tmp_path, caplog):
    path = tmp_path / "deep" / "r.jsonl"
    assert read_records(path) == []
    append_record(path, {"n": 0})
    with path.open("a") as file:
        file.write('{"n": 1, "los')
    assert read_records(path) == [{"n": 0}]
    assert "incomplete line" in caplog.text
    append_record(path, {"n": 2})
    assert read_records(path) == [{"n": 0}, {"n": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 0}\n{"n": \n{"n": 2}\n')
    with pytest.raises(ArtifactError, match=r"Line 2 of .*r\.jsonl is no JSON record"):
        read_records(path)


def test_a_record_without_a_number_is_rejected_and_nothing_is_written(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, {"n": 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(path, {"n": float("nan")})
    assert read_records(path) == [{"n": 0}]


def test_metrics_after_a_checkpoint_are_removed_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_records(path, [{"step": step, "loss": 1.0} for step in (10, 20, 20, 30)])
    trim_metrics(path, 20)
    assert [record["step"] for record in read_records(path)] == [10, 20, 20]
    trim_metrics(path, 0)
    assert read_records(path) == []
    trim_metrics(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_row_of_another_schema_names_the_keys():
    record = asdict(make_row("gsi", (1, 128), 0.9))
    del record["delta_nll"]
    record["speed"] = 1
    with pytest.raises(ArtifactError, match="missing or unknown keys: delta_nll, speed"):
        ResultRow.from_record(record)


def test_the_row_key_depends_on_all_inputs():
    row = make_row("gsi", (1, 128), 0.9)

    def key(**changes):
        depends_on = changes.pop("depends_on", row.depends_on)
        values = {"method": "gsi", "seed": None, "cell": row.cell, **changes}
        return row_key(values.values(), depends_on)

    other = {**row.depends_on, "report_sha256": "c" * 64}
    assert key() == row.key
    keys = {key(), key(seed=1), key(method="ppo"), key(cell=(1, 128, 0.8)), key(depends_on=other)}
    assert len(keys) == 5
    unrelated = replace(row, provenance={**row.provenance, "commit": "abc"})
    assert unrelated.key == key()
