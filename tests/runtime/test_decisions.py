import json

import pytest

from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.records import Decision, DecisionLog
from tests.programs import PythonProgram
from tests.runtime.harness import eventually


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
    path.write_bytes(b'{"time')
    DecisionLog(path).close()
    assert path.read_bytes() == b""


def test_a_closed_log_writes_nothing_and_a_failing_disk_raises_nothing(tmp_path, caplog):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.close()
    log.append(made())
    assert read(log.path) == []
    log = DecisionLog(log.path)

    class Full:
        closed = False

        def write(self, line):
            raise OSError(28, "No space left on device")

    log._file = Full()
    log.append(made())
    assert log.lost == 1
    assert caplog.text.count("can no longer be logged") == 1


_WRITER = """
import sys
from tests.runtime.test_decisions import made
from rap_env.runtime.records import DecisionLog
log = DecisionLog(sys.argv[1])
number = 0
while True:
    log.append(made(number))
    number += 1
    if number == 50:
        print("on", flush=True)
"""


def test_after_a_kill_all_complete_lines_are_valid(tmp_path):
    path, output = tmp_path / "decisions.jsonl", tmp_path / "output"
    with output.open("w") as file:
        writer = PythonProgram(["-c", _WRITER, str(path)], stdout=file, stderr=file)
    eventually(lambda: "on\n" in output.read_text())
    writer.kill()
    writer.wait()
    DecisionLog(path).close()
    times = [record["time_s"] for record in read(path)]
    assert times == [float(number) for number in range(len(times))]
    assert len(times) >= 50
