from __future__ import annotations

import dataclasses
import json
import subprocess

import benchmarks
from benchmarks.harness import Target
from benchmarks.table import differences, markdown, read_records
from tests.programs import run_python


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
    lines = markdown([_record("gsi", fast, slow), _record("load", slow, gpu="Toy GPU")]).split("\n")
    assert lines[0].startswith("| Benchmark |")
    assert lines[2:] == [
        "| `gsi` | times as fast | naive loop | 2.5 [2.4, 2.6] | ≥ 2.2 | yes | Toy, 2 threads |",
        "| `gsi` | seconds | - | 4 | ≤ 3 | no | Toy, 2 threads |",
        "| `load` | seconds | - | 4 | ≤ 3 | no | Toy GPU |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_the_differences_are_the_targets_that_one_device_alone_meets_or_has():
    def targets(reached: float, worst: int) -> list[Target]:
        return [
            Target(f"share (worst at {worst}%)", 0.9, None, reached),
            Target("twice", None, 1.0, 0.5, "one"),
            Target("twice", None, 1.0, 0.5 + reached, "other"),
        ]

    cpu = _record("decode", *targets(0.95, 29), Target("on the CPU alone", 1.0, None, 1.0))
    gpu = _record("decode", *targets(0.4, 15), gpu="Toy GPU")
    only_cpu = _record("load", Target("x", 1.0, None, 0.0))
    assert differences([cpu, gpu, only_cpu]).split("\n")[2:] == [
        "| `decode` | share (worst at 15%) | 0.95 (met) | 0.4 (missed) | ≥ 0.9 |",
        "| `decode` | twice | 1.45 (missed) | 0.9 (met) | ≤ 1 |",
        "| `decode` | on the CPU alone | 1 (met) | - | ≥ 1 |",
    ]
    same = {**cpu, "device": "cuda:0"}
    assert differences([cpu, same]).count("\n") == 1


def test_the_program_prints_the_records_of_a_folder(tmp_path):
    def run() -> subprocess.CompletedProcess[str]:
        return run_python("-m", "benchmarks.table", tmp_path, timeout=60)

    empty = run()
    assert (empty.returncode, empty.stdout) == (1, "")
    assert "No records here" in empty.stderr
    (tmp_path / "b-cpu.json").write_text(json.dumps(_record("b", Target("x", 1.0, None, 2.0))))
    (tmp_path / "a-cpu.json").write_text(json.dumps(_record("a", Target("x", 1.0, None, 2.0))))
    assert [record["benchmark"] for record in read_records(tmp_path)] == ["a", "b"]
    assert run().stdout.count("\n") == 4
    on_gpu = _record("b", Target("x", 1.0, None, 0.0), gpu="Toy GPU")
    (tmp_path / "b-cuda.json").write_text(json.dumps(on_gpu))
    assert "| `b` | x | 2 (met) | 0 (missed) | ≥ 1 |" in run().stdout


def test_the_committed_records_make_a_table():
    records = read_records()
    assert markdown(records).count("\n") == 1 + sum(len(record["targets"]) for record in records)
    assert benchmarks.__doc__
