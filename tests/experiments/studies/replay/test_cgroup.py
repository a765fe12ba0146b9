"""The trial in a memory cgroup: what a row says, its group and tenant, and its server."""

import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.config.study_settings import CgroupConfig
from experiments.studies.replay import cgroup
from experiments.studies.replay.cgroup import STUDY, TrialRow, TrialRun, memory_group, started
from experiments.study.console import ExperimentError
from rap_env.errors import UnknownNameError
from rap_env.models.files.sources import Located
from rap_env.runtime.memory_meter import resident_bytes


def sample(time_s, *, native=30, lowered=0, preempted=0, tokens=0, budget=2e8):
    return [time_s, 50e6, 300e6, budget, native, 3, lowered, preempted, 1000, 20, tokens]


def answer(asked_s, times_s, tokens=0, error=None):
    return {
        **{"asked_s": asked_s, "times_s": list(times_s), "tokens": tokens},
        **{"error": error, "delta_nll": 0.0},
    }


@pytest.fixture
def trial():
    """Ten native seconds, a squeeze from 10 to 12, memory from 11.5 on, two rows lowered to 13."""
    samples = [sample(s / 2) for s in range(20)]
    samples += [sample(10.0, native=0, budget=1e8), sample(10.5, native=0, budget=1e8)]
    samples += [sample(11.0, native=20, lowered=3, budget=1e8), sample(11.5, native=20, lowered=3)]
    samples += [sample(12.0, lowered=3), sample(12.5, lowered=1)]
    samples += [sample(13.0, preempted=1, tokens=60), *(sample(s / 2) for s in range(27, 30))]
    samples += [sample(15.0, native=0, preempted=1, tokens=60)]
    slow = [*(10 + 0.4 * s for s in range(10)), *(13.8 + s / 10 for s in range(12))]
    answers = [answer(0.0, (s / 10 for s in range(5, 100)), 95), answer(9.0, slow, 22)]
    answers += [answer(11.8, [11.9, 14.9], 2), answer(3.0, [], error="503")]
    depends_on = {"limit_mib": 760}
    return TrialRow("rap", 0, answers, samples, provenance={"depends_on": depends_on})


def test_a_row_says_what_happened(trial):
    values = cgroup.measures(trial)
    assert values["Requests failed"] == "1"
    assert values["Prompt tokens read again"] == "2.0 %"
    assert values["Tokens a second"] == "7.9"  # 119 in a quarter of a minute
    assert values["Longest time without a token"] == "0.5 s"  # before the first token
    assert values["Returns of memory"] == values["Preemptions"] == "1"
    rows = values["After a return: until all rows have native caches"]
    assert rows == "1.5 s (median of 1, at most 1.5 s)"  # at 12.5 a third of the rows is lower
    rate_s = float(values["until tokens come at the undisturbed rate"].split()[0])
    assert 1.4 < rate_s < 2.4  # from 13.8 on
    # 11.6 to 13.6 in 5 gaps, one of 0.2, then 0.1 to the last native sample.
    alive = [0.4] * 5 + [0.2] + [0.1] * 7
    slowdown = float(values["time per token of answers alive then"].split()[0])
    assert slowdown == pytest.approx(sum(alive) / len(alive) / 0.1, rel=0.02)


def test_a_table_has_a_column_for_each_server(trial, tmp_path):
    killed = TrialRow("transformers", 3, trial.answers[:1], trial.samples[:20])
    (table,) = STUDY.tables([trial, killed])
    header, lines = table.table
    assert header == ["", "rap serve", "transformers serve, bfloat16"]
    assert ["Processes killed, and started again", "0", "3"] in lines
    assert ["Returns of memory", "1", "-"] in lines
    STUDY.draw([trial], tmp_path)
    assert (tmp_path / "cgroup.png").stat().st_size > 5000


def test_each_server_has_its_command(monkeypatch):
    monkeypatch.setattr(cgroup, "gguf_source", lambda _name: Path("model.gguf"))
    monkeypatch.setattr(cgroup, "locate", lambda name: Located(name, Path("folder")))
    config = Config(stage="cgroup")
    commands = [" ".join(cgroup.command_of(name, config, 80)) for name in cgroup.SYSTEMS]
    assert commands[0].endswith(" --port 80 --threads 1")
    assert commands[1] == "llama-server -m model.gguf --port 80 -np 3 -c 3072 -t 1 -cram 0"
    assert "transformers serve folder --port 80 --device cpu --dtype bfloat16" in commands[2]
    with pytest.raises(UnknownNameError, match="vllm"):
        cgroup.command_of("vllm", config, 80)


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A folder that looks like the kernel's."""
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # the kernel's files go with their folder
    with memory_group(10**9) as folder:
        for name in ("server", "tenant"):
            (folder / name / "memory.stat").write_text("cache 7\ntotal_rss 5\n")
        yield folder
    assert not folder.exists()


def test_a_tenant_in_a_group_holds_what_it_is_told(group):
    assert (group / "memory.limit_in_bytes").read_text() == "1000000000"
    command = [sys.executable, "-c", cgroup._TENANT]
    tenant = started(group / "tenant", command, stdin=subprocess.PIPE)
    try:
        for size in (1, 60, 5):
            print(size, file=tenant.stdin, flush=True)
            deadline = time.monotonic() + 30
            while abs(resident_bytes(Path(f"/proc/{tenant.pid}"))[1] / 2**20 - size - 10) > 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        cgroup.ended(tenant)
    assert (group / "tenant" / "cgroup.procs").read_text().strip() == str(tenant.pid)


_SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"rap_running 2.0\\n" if self.path == "/metrics" else b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["stream"] and body["max_tokens"] == 128
        if os.path.exists(sys.argv[2]):
            os.remove(sys.argv[2])
            os._exit(9)
        events = [{"choices": [{}]}, {"choices": [{}], "rap": {"delta_nll": 0.25}},
                  {"choices": [], "usage": {"completion_tokens": 2}}]
        self.answer(b"".join(b"data: " + json.dumps(e).encode() + b"\\n\\n" for e in events))

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_trial_records_answers_and_starts_a_server_again_that_has_ended(
    group, tmp_path, monkeypatch
):
    crash = tmp_path / "crash"
    command = [sys.executable, "-c", _SERVER]
    monkeypatch.setattr(
        cgroup, "command_of", lambda _s, _c, port: [*command, str(port), str(crash)]
    )
    monkeypatch.setattr(cgroup, "memory_group", lambda _limit: nullcontext(group))
    (group / "server" / "memory.oom_control").write_text("under_oom 0\noom_kill 1\n")
    crash.write_text("")
    config = Config(stage="cgroup", cgroup=CgroupConfig(minutes=0.08, clients=2), progress=False)
    folder = STUDY.run(config, tmp_path / "run")
    (row,) = STUDY.read(folder)
    assert row.kills == 1
    good = [answer for answer in row.answers if answer["error"] is None]
    assert {(answer["tokens"], answer["delta_nll"]) for answer in good} == {(2, 0.25)}
    assert all(answer["asked_s"] <= min(answer["times_s"]) for answer in good)
    assert 1 <= len(row.answers) - len(good) <= 2  # those that were open at the end
    assert row.series["running"].max() == 2
    assert set(row.series["tenant_bytes"]) == {5}
    assert not crash.exists()


def test_a_server_that_ends_at_its_start_is_an_error(group, monkeypatch):
    monkeypatch.setattr(cgroup, "command_of", lambda *_: [sys.executable, "-c", ""])
    run = TrialRun("rap", Config(stage="cgroup"), group, None)
    with pytest.raises(ExperimentError, match="did not start"):
        run.wait_until_ready()


def test_without_such_groups_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path / "none")
    with pytest.raises(ExperimentError, match=r"No memory cgroup .* be root"):
        STUDY.run(Config(stage="cgroup", progress=False), tmp_path / "run")
