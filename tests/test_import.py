import importlib
import re
from pathlib import Path

import gymnasium
import pytest

import rap_env
from tests.imports import loaded_by

HEAVY = (
    "torch", "transformers", "matplotlib", "stable_baselines3", "hydra", "lm_eval", "PIL",
)  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "import gymnasium, rap_env; assert 'RAPPrune-v0' in gymnasium.registry",
        "import rap_env, gymnasium; assert 'RAPPrune-v0' in gymnasium.registry",
        "import rap_env; rap_env.Plan, rap_env.Request, rap_env.MemoryModel; "
        "import rap_env.render, rap_env.reward, rap_env.workload, rap_env.context",
    ],
    ids=["the package", "the package first", "the parts without a model"],
)
def test_importing_loads_nothing_heavy(code):
    assert loaded_by(code, of=HEAVY) == []


def test_gymnasium_imports_the_package_that_a_name_begins_with():
    name, model = "rap_env:RAPPrune-v0", "score_table:smollm2-135m"
    loaded_by(f"import gymnasium; gymnasium.make({name!r}, model={model!r}).reset(seed=0)")


def test_a_server_imports_no_environments():
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    code = "import rap_env.serving.stack, rap_env.serving.app, rap_env.serving.server"
    unused = ("gymnasium", "rap_env.envs.base", "transformers.generation.utils", "scipy")
    assert loaded_by(code, of=unused) == []


def test_the_package_needs_neither_stable_baselines_nor_hydra():
    code = (
        "import sys; sys.modules['stable_baselines3'] = sys.modules['hydra'] = None; "
        "import rap_env; [getattr(rap_env, name) for name in rap_env.__all__]"
    )
    assert loaded_by(code, of=("agents",)) == []


@pytest.mark.parametrize("name", rap_env.__all__)
def test_every_public_name_is_there(name):
    assert getattr(rap_env, name) is not None
    assert name in dir(rap_env)


def test_type_checkers_read_the_same_names_and_modules():
    stub = Path(rap_env.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert dict(re.findall(r"^from \S+ import (\w+) as (\w+)$", stub, re.M)).keys() == {
        *rap_env.__all__
    } - {"__version__"}
    for module, name in re.findall(r"^from (\S+) import (\w+)", stub, re.M):
        assert getattr(rap_env, name) is getattr(importlib.import_module(module), name)


def test_a_misspelt_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'load_lm'"):
        _ = rap_env.load_lm


def test_the_entry_point_is_a_name_so_that_a_spec_can_be_saved():
    assert gymnasium.spec("RAPPrune-v0").entry_point == "rap_env.envs.prune:RAPPruneEnv"
    assert "RAPPrune-v0" in gymnasium.spec("RAPPrune-v0").to_json()
