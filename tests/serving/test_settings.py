"""Settings are checked, read from files, and refused before weights are read if none can serve."""

import json
import re
from types import SimpleNamespace

import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import RapError, ServingSettingsError
from rap_env.memory import MemoryModel
from rap_env.models.weights.residency import RESIDENCIES
from rap_env.policies.loading import load_policy
from rap_env.policies.packaged_files import PACKAGED, default_facts
from rap_env.request import parse_bytes
from rap_env.runtime.plan_chooser import predicts
from rap_env.serving.prompts import MILD_SAMPLING, default_sampling
from rap_env.serving.settings import ServerSettings
from rap_env.serving.startup import bind, check_before_loading, url_of
from rap_env.specs import settings_of


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes must be .* at least 1, or none, not 0"),
        ({"memory": "much"}, "memory must be a number of bytes"),
        ({"model_memory": "auto"}, "model_memory must be a number of bytes"),
        ({"residency": "ofload"}, "residency 'ofload'"),
        ({"max_delta_nll": "low"}, "max_delta_nll 'low'"),
        ({"threads": 100_000}, "threads must be"),
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


def test_bytes_are_read_with_their_unit():
    for text, expected in (
        ("1048576", 2**20), ("2.5GiB", 5 * 2**29), ("800 MB", 800 * 10**6), ("1kB", 1000),
        ("512KiB", 2**19), (" 3 B ", 3), (4096, 4096),
    ):  # fmt: skip
        assert parse_bytes("memory", text) == expected
    for text in ("", "GiB", "-1", "2 GX", "1e9", "two"):
        words = f"reserve must be .* not {re.escape(repr(text))}"
        with pytest.raises(ServingSettingsError, match=words):
            parse_bytes("reserve", text)


def test_names_are_those_of_the_model():
    settings = settings_of(ServerSettings)
    assert {*settings["residency"].choices} < {*RESIDENCIES}


def test_an_address_can_be_bound_only_once():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ServingSettingsError, match=f"127.0.0.1:{port}.*another port"):
            bind("127.0.0.1", port)
    for host, port in (("no.such.host.invalid", 80),):
        with pytest.raises(ServingSettingsError, match=f"Cannot listen at {host}:{port}"):
            bind(host, port)


RAP = str(PACKAGED / "smollm2-135m.ladder.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A model's folder of which only the config can be read."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    (tmp_path / "other.json").write_text("{}")
    save_artifact(tmp_path / "facts.json", "model facts", 1, {})
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"policy": "nobody"}, "Unknown policy 'nobody'"),
        ({"policy": "{folder}/gone.json"}, "no such file"),
        ({"policy": "{folder}/other.json"}, "other.json is damaged, but the file of a policy"),
        ({"policy": "{folder}/facts.json"}, "facts.json is of the kind 'model facts', but"),
        ({"policy": "frontier"}, "other weights or another dtype"),
        ({"policy": "rap", "weights": "bf16"}, "exported for smollm2-135m.*needs weights='native'"),
        ({"dtype": "int3"}, "Unknown dtype 'int3'"),
    ],
)  # fmt: skip
def test_what_cannot_serve_is_named(folder, wrong, words):
    given = {k: v.format(folder=folder) for k, v in wrong.items()}
    with pytest.raises(RapError, match=words):
        check_before_loading(ServerSettings(**given))


@pytest.mark.parametrize(
    "right",
    [
        {}, {"policy": RAP}, {"policy": "frontier", "weights": "bf16"}, {"model": "{folder}"},
        {"policy": "some.module:policy"},
    ],
)  # fmt: skip
def test_what_can_serve_passes(folder, right):
    given = {k: v.format(folder=folder) for k, v in right.items()}
    check_before_loading(ServerSettings(**given))


@pytest.mark.parametrize(
    ("names", "predicted"),
    [(("knapsack", "rap", "rap-low-bits", "rap-recall"), True),
     (("dense", "frontier", "rap-v0"), False)],
)  # fmt: skip
def test_a_floor_needs_a_policy_with_predictions(names, predicted):
    for name in names:
        weights = "bf16" if name in ("frontier", "rap-v0") else "native"
        settings = ServerSettings(policy=name, max_delta_nll=0.1, weights=weights)
        memory = MemoryModel(default_facts(weights))
        assert predicts(load_policy(name, memory)) == predicted
        if predicted:
            check_before_loading(settings)
        else:
            with pytest.raises(RapError, match=f"max_delta_nll=0.1 needs .* {name} does not"):
                check_before_loading(settings)


def test_the_name_and_the_sampling_of_a_model_are_its_own(tmp_path):
    for model, name in {
        "a/b.Q4_K_M.gguf": "b.Q4_K_M", str(tmp_path): tmp_path.name, "org/name": "org/name",
    }.items():  # fmt: skip
        assert ServerSettings(model=model).served_name == name
    for own, expected in (({"temperature": 0.6, "top_p": None}, {"temperature": 0.6}),
                          ({}, MILD_SAMPLING)):  # fmt: skip
        llm = SimpleNamespace(model=SimpleNamespace(generation_config=SimpleNamespace(**own)))
        assert default_sampling(llm, "org/name") == expected
    assert default_sampling(llm, "smollm2-135m")["temperature"] == 0.2
