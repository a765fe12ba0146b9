"""Settings are checked and read from files, and a missing package is named."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, fields

import pytest

from rap_env.errors import (
    MissingDependencyError,
    RapError,
    ServingSettingsError,
    UnknownNameError,
)
from rap_env.models.caches.kv_cache import RESTORES
from rap_env.models.files.loading import WEIGHTS
from rap_env.models.weights.residency import RESIDENCIES
from rap_env.serving.server import bind, url_of
from rap_env.serving.settings import (
    CHOICES,
    ServerSettings,
    parse_bytes,
    read_settings_file,
    require_extra,
    setting_help,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 2**20), ("2.5GiB", 5 * 2**29), ("800 MB", 800 * 10**6), ("1kB", 1000),
        ("512KiB", 2**19), (" 3 B ", 3), (4096, 4096),
    ],
)  # fmt: skip
def test_bytes_are_read_with_their_unit(text, expected):
    assert parse_bytes("memory", text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 GX", "1e9", "two"])
def test_an_invalid_number_of_bytes_is_named(text):
    with pytest.raises(
        ServingSettingsError, match=f"reserve must be .* not {re.escape(repr(text))}"
    ):
        parse_bytes("reserve", text)


@pytest.mark.parametrize("name", ["settings.yaml", "settings.toml"])
def test_a_file_that_is_nested_too_deeply_is_named(tmp_path, name):
    (tmp_path / name).write_text("a = " + 9999 * "[" if name.endswith("toml") else 9999 * "[")
    with pytest.raises(ServingSettingsError, match=f"{name} is not valid"):
        read_settings_file(tmp_path / name)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes must be at least 1, not 0"),
        ({"max_choices": -1}, "max_choices"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({"body_timeout_s": 0}, "body_timeout_s must be above 0 seconds"),
        ({"shutdown_grace_s": float("nan")}, "shutdown_grace_s"),
        ({"memory": "much"}, "memory must be a number of bytes .* not 'much'"),
        ({"model_memory": "auto"}, "model_memory must be a number of bytes .* not 'auto'"),
        ({"residency": "gone"}, "residency"),
        ({"restore": "from_here"}, "restore"),
        ({"port": 70000}, "port must be from 0 to 65535"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_delta_nll": -0.1}, "max_delta_nll must be at least 0 nats per token and finite"),
        ({"max_delta_nll": float("nan")}, "max_delta_nll"),
        ({"min_quality_per_request": -1.0}, "min_quality_per_request must be at least 0 nats"),
        ({"max_delta_nll": 0.1, "min_quality_per_request": 0.2}, r"at most max_delta_nll \(0.1\)"),
        ({"max_delta_nll": "low"}, "max_delta_nll must be 'auto', null or a number, not 'low'"),
        ({"min_quality_per_request": 0.2}, r"at most max_delta_nll \(0.1\)"),
        ({"threads": 100_000}, r"threads must be at most \d+, the number of CPUs, not 100000"),
        ({"port": "8000"}, "port must be of type int, not '8000'"),
        ({"max_batch_size": True}, "max_batch_size must be of type int, not True"),
        ({"queue_timeout_s": "long"}, "queue_timeout_s must be of type float or null"),
    ],
)
def test_an_invalid_value_is_named(wrong, words):
    with pytest.raises(RapError, match=words):
        ServerSettings(**wrong)


def test_memory_limits_the_process_or_the_model():
    assert ServerSettings(memory="300MiB").process_bytes == 300 * 2**20
    assert ServerSettings(model_memory=1000).model_bytes == 1000
    settings = ServerSettings(memory="cgroup")
    assert (settings.process_bytes, settings.model_bytes) == (None, None)
    assert settings.reserve_bytes == 128 * 2**20
    with pytest.raises(ServingSettingsError, match="memory, .*300MiB.*, or model_memory, .*1000"):
        ServerSettings(memory="300MiB", model_memory=1000)


def test_names_are_those_of_the_model():
    assert set(CHOICES) == {"weights", "residency", "restore", "log_format", "log_level"}
    assert (CHOICES["residency"], CHOICES["restore"]) == (RESIDENCIES, RESTORES)
    assert set(WEIGHTS) <= set(CHOICES["weights"])


def test_every_setting_has_a_description():
    assert list(setting_help()) == [field.name for field in fields(ServerSettings)]
    assert setting_help()["port"] == "Port to listen at; 0 takes a free one."


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "policy: dense\nport: 0\nqueue_timeout_s: null\nmemory: 300MiB\n"),
        (".yml", "{policy: dense, port: 0, queue_timeout_s: ~, memory: 300MiB}"),
        (".toml", 'policy = "dense"\nport = 0\nmemory = "300MiB"\n'),
    ],
)
def test_files_give_settings(tmp_path, suffix, text):
    path = tmp_path / f"serve{suffix}"
    path.write_text(text)
    found = ServerSettings.from_mapping(read_settings_file(path))
    timeout_s = 120.0 if suffix == ".toml" else None
    assert asdict(found) == asdict(
        ServerSettings(policy="dense", port=0, memory="300MiB", queue_timeout_s=timeout_s)
    )


def test_an_unknown_setting_is_named_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="'prot'.*'max_queue'.*Did you mean 'port'"):
        ServerSettings.from_mapping({"prot": 1})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.yaml", None, "Cannot read .*absent.yaml: No such file"),
        ("a.ini", "", "suffix .yaml, .yml or .toml, not '.ini'"),
        ("a.yaml", "a: [", "a.yaml is not valid yaml"),
        ("a.toml", "a = ", "a.toml is not valid toml"),
        ("a.yaml", "- a", "must hold settings as 'name: value', not a list"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ServingSettingsError, match=words):
        read_settings_file(tmp_path / name)


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_settings_file(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "prometheus_client", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(module, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "rap_env.serving.settings.find_spec", lambda n: None if n == module else find(n)
    )
    with pytest.raises(MissingDependencyError, match=r"rap-env\[serve\]"):
        require_extra()


def test_an_address_can_be_bound_only_once():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ServingSettingsError, match=f"127.0.0.1:{port}.*another port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 99999)])
def test_an_invalid_address_is_named(host, port):
    with pytest.raises(ServingSettingsError, match=f"Cannot listen at {host}:{port}"):
        bind(host, port)
