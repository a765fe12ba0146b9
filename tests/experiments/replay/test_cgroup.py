"""The trial in a memory cgroup: its groups and tenant, what a record says, where it is skipped."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.replay import cgroup
from experiments.replay.cgroup import MemoryGroup, command_of
from experiments.replay.trial import SYSTEMS, Answer, Trial, trial_figure, trial_table
from experiments.study.experiment_errors import ExperimentError
from rap_env.errors import UnknownNameError
from rap_env.models.files.sources import Located
from rap_env.runtime.memory_meter import resident_bytes


def row(time_s, *, native=30, lowered=0, preempted=0, tokens=0, budget=2e8):
    return [time_s, 50e6, 300e6, budget, native, 3, 0, lowered, preempted, 1000, 20, 0, tokens]


@pytest.fixture
def run():
    """Ten native seconds, a squeeze from 10 to 12, memory from 11.5 on, two rows lowered to 13."""
    rows = [row(s / 2) for s in range(20)]
    rows += [row(10.0, native=0, budget=1e8), row(10.5, native=0, budget=1e8)]
    rows += [row(11.0, native=20, lowered=3, budget=1e8), row(11.5, native=20, lowered=3)]
    rows += [row(12.0, lowered=3), row(12.5, lowered=1), row(13.0, preempted=1, tokens=60)]
    rows += [row(s / 2) for s in range(27, 30)]
    rows += [row(15.0, native=0, preempted=1, tokens=60)]
    calm = Answer(0.0, [s / 10 for s in range(5, 100)], 95)
    slow = [*(10 + 0.4 * s for s in range(10)), *(13.8 + s / 10 for s in range(12))]
    answers = [calm, Answer(9.0, slow, 22), Answer(11.8, [11.9, 14.9], 2), Answer(3.0, error="503")]
    return Trial({"limit_mib": 760, "minutes": 0.25}, answers=answers, samples=rows)


def test_a_record_says_what_happened(run):
    assert run.longest_silence_s == 0.5  # before the first token
    assert [since_s for since_s, _ in run.returns] == [11.5]
    assert run.recoveries_s == [1.5]  # at 12.5 a third of the rows is lower
    (gap_s,) = {round(gap_s, 6) for gap_s in run.calm_gaps_s}
    assert gap_s == 0.1
    (rate_s,) = run.rate_recoveries_s
    assert 1.4 < rate_s < 2.4  # from 13.8 on
    # 11.6 to 13.6 in 5 gaps, one of 0.2, then 0.1 to the last native sample.
    alive = [0.4] * 5 + [0.2] + [0.1] * 7
    assert run.slowdown == pytest.approx(sum(alive) / len(alive) / 0.1, rel=0.02)
    assert run.measures["Requests failed"] == "1"
    assert run.measures["Prompt tokens read again"] == "2.0 %"
    assert run.measures["Tokens a second"] == "7.9"  # 119 in a quarter of a minute


def test_a_table_has_a_column_for_each_system(run, tmp_path):
    run.write(tmp_path / "rap.json.gz")
    killed = Trial(run.settings, kills=3, answers=run.answers[:1], samples=run.samples[:20])
    table = trial_table({"rap": Trial.read(tmp_path / "rap.json.gz"), "transformers": killed})
    assert "| | rap serve | transformers serve, bfloat16 |" in table.replace("|  |", "| |")
    assert "| Processes killed, and started again | 0 | 3 |" in table
    assert "| Returns of memory | 1 | - |" in table


def test_each_system_has_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "gguf_file", lambda _name: Path("model.gguf"))
    monkeypatch.setattr(cgroup, "locate", lambda name: Located(name, Path("folder")))
    config = Config(stage="cgroup")
    commands = [" ".join(command_of(system, config, 80, tmp_path)) for system in SYSTEMS]
    assert commands[0].endswith(f"--port 80 --threads 1 --decisions {tmp_path}/decisions.jsonl")
    assert commands[1] == "llama-server -m model.gguf --port 80 -np 3 -c 3072 -t 1 -cram 0"
    assert "transformers serve folder --port 80 --device cpu --dtype bfloat16" in commands[2]
    with pytest.raises(UnknownNameError, match="vllm"):
        command_of("vllm", config, 80, tmp_path)


def test_a_server_that_has_ended_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    group = MemoryGroup(10**9)
    server = cgroup._Server(group, [sys.executable, "-c", ""], 1, None)
    with pytest.raises(ExperimentError, match="did not start"):
        server.wait_until_ready()
    first = server.process
    server.start_again()
    assert server.process.pid != first.pid
    assert cgroup.scraped(1) == {}
    cgroup._end(server.process)


def test_the_figure_has_memory_levels_and_tokens(run):
    labels = [axes.get_ylabel() for axes in trial_figure(run).axes]
    assert labels == ["resident memory, MiB", "native caches, %", "tokens a second"]


def test_a_tenant_in_a_group_holds_what_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)  # a folder that looks like the kernel's
    group = MemoryGroup(10**9)
    (folder,) = tmp_path.iterdir()
    assert (folder / "memory.limit_in_bytes").read_text() == "1000000000"
    command = [sys.executable, "-c", cgroup._TENANT]
    tenant = group.start("tenant", command, stdin=subprocess.PIPE)
    try:
        for size in (1, 60, 5):
            tenant.stdin.write(f"{size}\n")
            tenant.stdin.flush()
            deadline = time.monotonic() + 30
            while abs(resident_mib(tenant.pid) - size - 10) > 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        cgroup._end(tenant)
    assert (folder / "tenant" / "cgroup.procs").read_text().strip() == str(tenant.pid)
    (folder / "tenant" / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 2\n")
    assert group.kills == 2


def resident_mib(pid: int) -> float:
    return resident_bytes(Path(f"/proc/{pid}"))[1] / 2**20


def test_without_such_groups_it_is_skipped_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path / "none")
    cgroup.trial(Config(stage="cgroup"), tmp_path / "run")
    assert "Skipped: no memory cgroup of version 1 can be made here" in capsys.readouterr().out
