"""The trial in a memory cgroup: its groups and tenant, what a record says, where it is skipped."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.replay import cgroup
from experiments.replay.cgroup import Answer, MemoryGroup, Trial, trial_figure
from rap_env.runtime.memory_meter import resident_bytes


def row(time_s, *, native=30, running=3, lowered=0, preempted=0, tokens=0):
    return [time_s, 50e6, 300e6, 2e8, native, running, 0, lowered, preempted, 1000, 20, 0, tokens]


@pytest.fixture
def run():
    rows = [
        row(0.0), row(0.5, native=0), row(1.0, native=20, lowered=3), row(1.5, lowered=3),
        row(2.0, lowered=1), row(2.5, preempted=1, tokens=60), row(3.0, native=0), row(3.5),
    ]  # fmt: skip
    answers = [Answer(0.0, [0.5, 0.6, 0.7], 3), Answer(0.2, [2.9], 1), Answer(3.0, error="503")]
    return Trial({"limit_mib": 760}, answers=answers, samples=rows)


def test_a_record_says_what_happened(run):
    assert run.longest_silence_s == pytest.approx(2.2)
    assert run.recoveries_s == [1.0, 0.0]
    assert "2 of 3 requests answered, 0 processes killed" in run.summary
    assert "2.0 % of the prompt tokens were read again" in run.summary


def test_the_figure_has_memory_levels_and_tokens(run):
    run.samples *= 3
    labels = [axes.get_ylabel() for axes in trial_figure(run).axes]
    assert labels == ["resident memory, MiB", "native caches, %", "tokens a second"]


def test_a_tenant_in_a_group_holds_what_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)  # a folder that looks like the kernel's
    group = MemoryGroup(10**9)
    (folder,) = tmp_path.iterdir()
    assert (folder / "memory.limit_in_bytes").read_text() == "1000000000"
    command = [sys.executable, "-c", cgroup._TENANT]
    with cgroup._process(group.start("tenant", command, stdin=subprocess.PIPE)) as tenant:
        for size in (1, 60, 5):
            tenant.stdin.write(f"{size}\n")
            tenant.stdin.flush()
            deadline = time.monotonic() + 30
            while abs(resident_mib(tenant.pid) - size - 10) > 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert (folder / "tenant" / "cgroup.procs").read_text().strip() == str(tenant.pid)
    (folder / "tenant" / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 2\n")
    assert group.kills == 2


def resident_mib(pid: int) -> float:
    return resident_bytes(Path(f"/proc/{pid}"))[1] / 2**20


def test_without_such_groups_it_is_skipped_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path / "none")
    cgroup.trial(Config(stage="cgroup"), tmp_path / "run")
    assert "Skipped: no memory cgroup of version 1 can be made here" in capsys.readouterr().out
