"""Two servers never write the same files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rap_env.errors import ServingSettingsError
from rap_env.serving import stack
from rap_env.serving.run_lock import written_files_locked
from rap_env.serving.settings import ServerSettings

HOLD = """
import sys
from rap_env.serving.run_lock import written_files_locked
from rap_env.serving.settings import ServerSettings
with written_files_locked(ServerSettings(decisions=sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_server_names_the_first_and_a_killed_one_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "run" / "decisions.jsonl"
    settings = ServerSettings(decisions=str(path), port=0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"held\n"
        monkeypatch.setattr(stack, "build_stack", lambda _settings: pytest.fail("it was loaded"))
        for _ in range(2):  # an attempt leaves the file as it is
            with pytest.raises(ServingSettingsError, match=f"Process {first.pid} serves with deci"):
                stack.serve(settings, print)
        with written_files_locked(ServerSettings(decisions=str(tmp_path / "run" / "others.jsonl"))):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait(20)
    with (
        written_files_locked(settings),
        pytest.raises(ServingSettingsError, match=f"Process {os.getpid()} "),
        written_files_locked(settings),
    ):
        pass
    with written_files_locked(settings):
        pass


def test_a_log_file_is_locked_too_and_a_lock_without_a_name_is_one(tmp_path):
    settings = ServerSettings(log_file=str(tmp_path / "server.log"))
    with written_files_locked(settings):
        (tmp_path / ".server.log.lock").write_text("")
        with (
            pytest.raises(ServingSettingsError, match="Another process serves with log_file"),
            written_files_locked(settings),
        ):
            pass


def test_without_files_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_files_locked(ServerSettings()), written_files_locked(ServerSettings()):
        assert not list(tmp_path.iterdir())
