import dataclasses
import json
from dataclasses import dataclass

import pytest

from benchmarks.measuring import Settings, spread
from benchmarks.record import Target, committed_records, targets_table, write_record


@dataclass
class _Settings(Settings):
    batch_size: int = 3


@pytest.mark.parametrize(
    ("at_least", "at_most", "reached", "met"),
    [
        (2.0, None, 2.0, True),
        (2.0, None, 1.9, False),
        (None, 3.0, 3.0, True),
        (None, 3.0, 3.1, False),
        (2.0, 3.0, 2.5, True),
        (2.0, 3.0, 1.0, False),
    ],
)
def test_a_target_is_met_within_its_bounds(at_least, at_most, reached, met):
    assert Target("ratio", at_least, at_most, reached).met is met


def test_a_record_states_how_the_numbers_were_measured(tmp_path, capsys):
    slow = Target("seconds", None, 3.0, 4.0, low=3.5, high=5.0)
    path = write_record(
        "toy",
        device="cuda:1",
        settings=_Settings(results_dir=str(tmp_path), batch_size=7),
        targets=[Target("ratio", 2.0, None, 3.0), slow],
        measured={"side": {"step_s": spread([1.0, 2.0, 3.0]), "bytes": 123_456}},
        notes=["It was warm."],
    )
    assert path == tmp_path / "toy-cuda.json"
    record = json.loads(path.read_text())
    assert record["device"] == "cuda:1"
    assert record["settings"] == {"repeats": 5, "threads": None, "batch_size": 7}
    assert [target["met"] for target in record["targets"]] == [True, False]
    assert record["measured"]["side"]["step_s"]["median"] == 2.0
    assert record["notes"] == ["It was warm."]
    assert {"cpu", "cores", "instruction_sets", "memory_bytes"} <= record["machine"].keys()
    assert {"python", "torch", "transformers", "gymnasium", "rap_env"} <= record["versions"].keys()
    assert {"commit", "dirty", "date"} <= record.keys()
    assert "| seconds | - | 4 [3.5, 5] | ≤ 3 | no |" in capsys.readouterr().out


def _record(name: str, *targets: Target, **machine: object) -> dict[str, object]:
    return {
        "benchmark": name,
        "device": "cuda:0" if "gpu" in machine else "cpu",
        "machine": {"cpu": "Toy", "threads": 2, **machine},
        "targets": [{**dataclasses.asdict(t), "met": t.met} for t in targets],
    }


def test_the_table_has_a_row_for_each_target():
    fast = Target("times as fast", 2.2, None, 2.5, "naive loop", 2.4, 2.6)
    slow = Target("seconds", None, 3.0, 4.0)
    lines = targets_table([_record("gsi", fast, slow), _record("load", slow, gpu="Toy GPU")]).split(
        "\n"
    )
    assert lines[0].startswith("| Benchmark |")
    assert lines[2:] == [
        "| `gsi` | times as fast | naive loop | 2.5 [2.4, 2.6] | ≥ 2.2 | yes | Toy, 2 threads |",
        "| `gsi` | seconds | - | 4 | ≤ 3 | no | Toy, 2 threads |",
        "| `load` | seconds | - | 4 | ≤ 3 | no | Toy GPU |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_the_committed_records_make_a_table():
    records = committed_records()
    assert targets_table(records).count("\n") == 1 + sum(
        len(record["targets"]) for record in records
    )
