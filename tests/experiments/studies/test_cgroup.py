"""The trial in a memory cgroup: what a row says, its group and tenant, and its server."""

import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.config.program_settings import CgroupConfig
from experiments.studies import cgroup
from experiments.studies.cgroup import STUDY, TrialRow, inside, memory_group
from experiments.study import servers
from experiments.study.console import ExperimentError
from experiments.study.servers import Server, end_process
from rap_env.errors import UnknownNameError
from rap_env.models.device import resident_bytes


def answer(asked_s, times_s, tokens=0, error=None):
    return {
        "asked_s": asked_s,
        "times_s": list(times_s),
        "tokens": tokens,
        "error": error,
        "delta_nll": 0.5,
    }


def test_a_table_has_a_column_for_each_server():
    answers = [answer(0.0, (s / 10 for s in range(5, 100)), 95), answer(11.8, [11.9, 14.9], 2)]
    trial = TrialRow("rap", 0, [*answers, answer(3.0, [], error="503")], 0.25)
    (table,) = STUDY.tables([trial, TrialRow("transformers", 3, [answer(0.0, [], 0, "503")], 0.1)])
    assert [*table.table] == ["", "rap serve", "transformers serve, bfloat16"]
    values = {name: columns for name, *columns in table.table.to_numpy().tolist()}
    assert list(values) == list(cgroup.measures(trial))
    assert values["Requests failed"] == ["1", "1"]
    assert values["Processes killed, and started again"] == ["0", "3"]
    assert values["Tokens a second"] == ["6.5", "0.0"]  # 97 in a quarter of a minute
    assert values["Longest time without a token"] == ["3.0 s", "0.0 s"]
    assert values["Longest time without a token, an answer under way"] == ["3.0 s", "0.0 s"]
    assert values["Longest time between the pieces of an answer"] == ["3.0 s", "0.0 s"]
    assert values["Time between the pieces of an answer, median"] == ["100 ms", "0 ms"]
    assert values["ΔNLL of the answers' plans, mean"] == ["0.500", "-"]


def test_silence_counts_while_an_answer_is_under_way():
    preempted = answer(0.0, [1.0, 2.0, 11.0, 12.0])
    beside_it = answer(3.0, [3.5, 5.5, 7.0])
    values = cgroup.measures(TrialRow("rap", 0, [preempted, beside_it, answer(20.0, [30.0])], 1.0))
    assert values["Longest time between the pieces of an answer"] == "9.0 s"
    assert values["Longest time without a token, an answer under way"] == "4.0 s"
    assert values["Longest time without a token"] == "10.0 s"


def test_each_server_has_its_command(monkeypatch):
    monkeypatch.setattr(servers, "gguf_source", lambda _name: Path("model.gguf"))
    config = Config(stage="cgroup")
    kinds = ("rap", "rap_keep_off", "llama.cpp")
    commands = [" ".join(cgroup.command_of(name, config)) for name in kinds]
    assert commands[0].endswith(" --threads 1 --keep on")
    assert commands[1].endswith(" --threads 1 --keep off")
    assert commands[2] == "llama-server -m model.gguf -t 1 -np 3 -c 3072 -cram 0"
    with pytest.raises(UnknownNameError, match="vllm"):
        Config(stage="cgroup", cgroup=CgroupConfig(systems=["vllm"]))


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A folder that looks like the kernel's."""
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # the kernel's files go with their folder
    with memory_group() as folder:
        yield folder
    assert not folder.exists()


def test_a_tenant_in_a_group_holds_what_it_is_told(group):
    assert (group / "memory.limit_in_bytes").read_text() == str(760 * 2**20)
    command = inside(group / "tenant", [sys.executable, "-c", cgroup._TENANT])
    tenant = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    try:
        for size in (1, 60, 5):
            print(size, file=tenant.stdin, flush=True)
            deadline = time.monotonic() + 30
            while abs(resident_bytes(Path(f"/proc/{tenant.pid}"))[1] / 2**20 - size - 10) > 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        end_process(tenant)
    assert (group / "tenant" / "cgroup.procs").read_text().strip() == str(tenant.pid)


_SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["stream"] and body["max_tokens"] == 128
        if os.path.exists(sys.argv[1]):
            os.remove(sys.argv[1])
            os._exit(9)
        sent = len(body["messages"])
        assert all(m["content"] == "ab" for m in body["messages"] if m["role"] == "assistant")
        events = [{"choices": [{"delta": {"content": "a"}}]},
                  {"choices": [{"delta": {"content": "b"}}], "rap": {"delta_nll": 0.25}},
                  {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": sent,
                   "prompt_tokens_details": {"cached_tokens": sent - 1}}}]
        self.answer(b"".join(b"data: " + json.dumps(e).encode() + b"\\n\\n" for e in events))

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
"""


@pytest.fixture
def trial(group, tmp_path, monkeypatch):
    """Runs a trial of five seconds, with so many turns of a conversation."""
    command = [sys.executable, "-c", _SERVER, str(tmp_path / "crash")]
    monkeypatch.setattr(cgroup, "command_of", lambda *_: command)
    monkeypatch.setattr(cgroup, "memory_group", lambda: nullcontext(group))
    (group / "server" / "memory.oom_control").write_text("under_oom 0\noom_kill 1\n")

    def run(turns):
        settings = CgroupConfig(minutes=0.08, turns=turns)
        config = Config(stage="cgroup", cgroup=settings, progress=False)
        (row,) = STUDY.read(STUDY.run(config, tmp_path / "run"))
        return row

    return run


def test_a_trial_records_answers_and_starts_a_server_again_that_has_ended(trial, tmp_path):
    crash = tmp_path / "crash"
    crash.write_text("")
    row = trial(1)
    assert row.kills == 1
    good = [answer for answer in row.answers if answer["error"] is None]
    assert {(answer["tokens"], answer["delta_nll"]) for answer in good} == {(2, 0.25)}
    assert all(answer["asked_s"] <= min(answer["times_s"]) for answer in good)
    assert 1 <= len(row.answers) - len(good) <= 3  # those that were open at the end
    assert row.minutes == pytest.approx(0.08, abs=0.03)
    assert not crash.exists()


def test_each_turn_of_a_conversation_sends_the_history(trial):
    row = trial(3)
    answers = [answer for answer in row.answers if answer["error"] is None]
    counts = {(a["turn"], a["prompt_tokens"], a["kept_tokens"]) for a in answers}
    assert counts == {(0, 1, 0), (1, 3, 2), (2, 5, 4)}  # the server counts messages
    values = cgroup.measures(row)
    kept = values["Prompt tokens of later turns that were kept"]
    assert 74 < float(kept.removesuffix(" %")) <= 75.1  # the last conversation may end early
    all_turns, kept_turns, read_again = (
        words for name, words in values.items() if name.startswith("First token of later turns")
    )
    assert read_again == "-", "each later turn takes over more than half of its prompt"
    assert all_turns == kept_turns != "-"


def test_a_server_that_ends_at_its_start_is_an_error():
    with pytest.raises(ExperimentError, match="did not start"):
        Server([sys.executable, "-c", ""]).wait_until_ready()


def test_without_such_groups_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path / "none")
    with pytest.raises(ExperimentError, match=r"No memory cgroup .* be root"):
        STUDY.run(Config(stage="cgroup", progress=False), tmp_path / "run")
