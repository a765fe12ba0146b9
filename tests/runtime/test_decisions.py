from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from rap_env.plan import Plan
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.decisions import Decision, DecisionLog


def made(number: int = 0) -> Decision:
    return Decision(
        time_s=float(number),
        wall_time="2030-01-01T00:00:00.000+00:00",
        trigger="budget_fell",
        before=Plan(),
        after=Plan.removing("layer00.attn", "layer02.ffn"),
        bytes_before=1000,
        bytes_after=700,
        budget_bytes=800,
        shape=BatchShape(2, 30),
        decision_s=0.001,
        switch_s=0.002,
        guarded=True,
    )


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_decision_is_a_json_line_with_names_and_bytes(tmp_path):
    path = tmp_path / "deep" / "decisions.jsonl"
    log = DecisionLog(path)
    log.append(made())
    log.append(made(1))
    log.close()
    first, second = read(path)
    assert first["from"] == []
    assert first["to"] == ["layer00.attn", "layer02.ffn"]
    assert first["demand"] == {"batch_size": 2, "seq_len_tokens": 30}
    assert (first["why"], first["guarded"]) == ("budget_fell", True)
    assert second["time_s"] == 1.0


@pytest.mark.parametrize("torn", [b'{"time_s": 3.0, "wa', b"x" * 200_000, b"\xff\xfe"])
def test_an_incomplete_last_line_is_removed_when_the_file_is_opened_again(tmp_path, torn):
    path = tmp_path / "decisions.jsonl"
    for number in range(3):
        log = DecisionLog(path)
        log.append(made(number))
        log.close()
        with path.open("ab") as file:
            file.write(torn)
    DecisionLog(path).close()
    assert [record["time_s"] for record in read(path)] == [0.0, 1.0, 2.0]


def test_a_file_of_one_incomplete_line_becomes_empty(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(b'{"time')
    DecisionLog(path).close()
    assert path.read_bytes() == b""


def test_a_failing_disk_loses_lines_but_does_not_raise(tmp_path, caplog):
    log = DecisionLog(tmp_path / "decisions.jsonl")

    class Full:
        closed = False

        def write(self, line):
            raise OSError(28, "No space left on device")

    log._file = Full()
    log.append(made())
    log.append(made())
    assert log.lost == 2
    assert caplog.text.count("can no longer be logged") == 1


def test_a_closed_log_writes_nothing(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.close()
    log.append(made())
    assert read(log.path) == []


_WRITER = """
import sys
from tests.runtime.test_decisions import made
from rap_env.runtime.decisions import DecisionLog
log = DecisionLog(sys.argv[1])
number = 0
while True:
    log.append(made(number))
    number += 1
    if number == 50:
        print("on", flush=True)
"""


def test_after_a_kill_all_complete_lines_are_valid(tmp_path):
    path = tmp_path / "decisions.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"on\n"
        os.kill(writer.pid, signal.SIGKILL)
    DecisionLog(path).close()
    times = [record["time_s"] for record in read(path)]
    assert times == [float(number) for number in range(len(times))]
    assert len(times) >= 50
