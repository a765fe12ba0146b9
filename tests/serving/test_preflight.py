"""Settings that cannot serve are refused before torch is imported and weights are read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import RapError
from rap_env.memory import MemoryModel
from rap_env.policies.loading import load_policy, policy_blocks
from rap_env.policies.packaged_files import PACKAGED, default_facts
from rap_env.policies.registry import packaged_policies
from rap_env.runtime.plan_chooser import predicts
from rap_env.serving.preflight import _PREDICTING, check_before_loading
from rap_env.serving.settings import ServerSettings

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
        ({"policy": "{folder}/config.json"}, "config.json is damaged"),
        ({"policy": "frontier"}, "other weights or another dtype"),
        ({"policy": "rap", "weights": "bf16"}, 'is of smollm2-135m.* with native weights'),
        ({"policy": RAP, "model": "{folder}"}, "of a model with 60 blocks, but .* has 8;"),
        ({"policy": "rap-v0", "model": "{folder}"}, "of a model with 60 blocks, but .* has 8;"),
        ({"model": "{folder}/gone"}, "There is no model folder or GGUF file .*gone"),
        ({"model_memory": "1MiB"}, r"model_memory must be at least [\d,]+ bytes"),
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
        {}, {"policy": "rap"}, {"policy": RAP}, {"policy": "rap-v0", "weights": "bf16"},
        {"policy": "frontier", "weights": "bf16"}, {"model": "{folder}"},
        {"model": "{folder}", "policy": "dense"}, {"model": "some/hub-id", "policy": "rap-v0"},
        {"model_memory": "40MiB"}, {"weights": "int4", "policy": "rap-v0"},
        {"policy": "some.module:policy"},
    ],
)  # fmt: skip
def test_what_can_serve_passes(folder, right):
    given = {k: v.format(folder=folder) for k, v in right.items()}
    check_before_loading(ServerSettings(**given))


def test_the_policies_without_predictions_are_named():
    names = {"dense", *packaged_policies()}
    for name in names:
        masks = name in ("frontier", "rap-v0")
        memory = MemoryModel(default_facts("bf16" if masks else "native"))
        assert predicts(load_policy(name, memory)) == (name in _PREDICTING)
    for name in names - {*_PREDICTING}:
        settings = ServerSettings(policy=name, min_quality_per_request=0.1)
        with pytest.raises(RapError, match=f"min_quality_per_request=0.1 needs .* {name} does not"):
            check_before_loading(settings)


def test_the_blocks_of_a_policy_are_those_of_its_model():
    assert policy_blocks("rap") == policy_blocks(RAP) == 60
    assert policy_blocks("dense") is policy_blocks("frontier") is None


def test_the_command_ends_without_torch():
    code = (
        "import sys; from rap_env.cli import main\n"
        "try: main(['serve', '--policy', 'nobody'])\n"
        "except SystemExit as ended: assert ended.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown policy 'nobody'" in done.stderr
