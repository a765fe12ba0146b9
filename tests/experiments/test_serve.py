"""The serving program: settings, startup, shutdown, and restart after a kill."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx

from experiments.config import as_config
from experiments.config.serving import SoakConfig
from experiments.contexts import server_settings
from experiments.errors import ExperimentError
from experiments.launch import CONF_DIR, register
from rap_env.errors import UnknownNameError
from rap_env.serving.settings import ServerSettings
from tests.programs import PythonProgram, run_python
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_the_defaults_compose_and_are_local(tmp_path):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        config = as_config(compose("serve"))
        soak = as_config(compose("soak"))
    assert config.stage == "serve"
    settings = server_settings(config, tmp_path)
    decisions = str(tmp_path / "decisions.jsonl")
    assert settings == ServerSettings(model="smollm2-135m", decisions=decisions)
    assert settings.host == "127.0.0.1"
    assert settings.policy == "knapsack-by-text"
    assert settings.weights == "native"
    assert soak.soak == SoakConfig()
    assert soak.soak.requests == 10_000


def test_an_unknown_or_invalid_setting_is_named(tmp_path):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        with pytest.raises(HydraException, match="prot"):
            compose("serve", overrides=["serve.prot=1"])
        config = as_config(compose("serve", overrides=["serve.residency=gone"]))
    with pytest.raises(UnknownNameError, match="residency"):
        server_settings(config, tmp_path)


def test_impossible_soaks_are_named():
    with pytest.raises(UnknownNameError, match="soak.meter"):
        SoakConfig(meter="guess")
    with pytest.raises(ExperimentError, match="hang_s"):
        SoakConfig(hang_s=0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(layers=4).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


class Served:
    """The program in a separate process."""

    def __init__(self, folder, runs, *overrides):
        arguments = [
            "-m", "experiments.serve", "model=custom", f"model.name={folder}",
            "model.dtype=float32", "threads=1", f"runs_dir={runs}", "serve.port=0",
            "serve.policy=dense", "serve.model_name=tiny", *overrides,
        ]  # fmt: skip
        self.process = PythonProgram(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.lstrip().startswith("curl "):
                break
        found = re.search(r"http://[\d.]+:\d+", "".join(self.lines))
        assert found, "".join(self.lines)
        self.url = found[0]

    def post(self, key=None):
        body = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 8}
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=30)

    def ask(self, key=None):
        response = self.post(key)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]


def test_after_a_kill_it_serves_with_a_complete_log_and_keys_can_change(model_folder, tmp_path):
    decisions = tmp_path / "default" / "serve" / "decisions.jsonl"
    first = Served(model_folder, tmp_path)
    try:
        text = "".join(first.lines)
        assert "tiny is served at" in text
        assert "Policy: dense" in text
        assert str(decisions) in text
        answer = first.ask()
        first.process.kill()
        assert first.process.wait(20) == -signal.SIGKILL
        with decisions.open("a") as file:
            file.write('{"time_s": 1}\n{"time_s": 2, "wh')  # as a kill may leave it
        port = first.url.rpartition(":")[2]
        keys = tmp_path / "keys"
        keys.write_text("old\n")
        second = Served(model_folder, tmp_path, f"serve.port={port}", f"serve.api_key_file={keys}")
    finally:
        first.process.kill()
    try:
        assert second.url == first.url
        assert second.ask("old") == answer
        assert [json.loads(line) for line in decisions.open()] == [{"time_s": 1}]
        keys.write_text("new\n")
        second.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while second.post("new").status_code == 401:
            assert time.monotonic() < deadline
        assert second.post("old").status_code == 401
        second.process.send_signal(signal.SIGTERM)
        rest, _ = second.process.communicate(timeout=30)
        assert second.process.returncode == 0
        assert "Ended: 2 answers with 16 tokens" in rest
    finally:
        second.process.kill()


def test_a_port_in_use_is_reported_before_the_model_is_loaded(model_folder, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_python(
            "-m", "experiments.serve", f"serve.port={port}", "threads=1", f"runs_dir={tmp_path}",
            "model=custom", "model.name=/nowhere/at/all", cwd=ROOT,
        )  # fmt: skip
    assert result.returncode == 2
    assert f"Cannot listen at 127.0.0.1:{port}" in result.stderr
    assert "choose another port" in result.stderr
    assert "Traceback" not in result.stderr
