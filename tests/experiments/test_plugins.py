"""A policy, an agent and a baseline of another package, `tests/plugin_package`."""

import sys
from pathlib import Path

import pytest
import torch

from agents.algorithms import AgentConfig, AgentConfigError
from agents.checkpoint import checkpoint_of
from experiments.comparison.result_rows import ResultRow
from experiments.evaluate import evaluate
from experiments.launch import launch
from experiments.train import run_trial
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.plugins import PluginError
from rap_env.policies.loading import load_policy, make_method
from tests.agents.synthetic import SyntheticContext, facts, request_at
from tests.models.states import saved

PACKAGE = Path(__file__).parents[1] / "plugin_package"
METHOD = "rap_example.methods:LargestFirst"


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of the package's agent and baseline, made by the programs on a tiny model."""
    base = tmp_path_factory.mktemp("compared")
    saved(base / "model", dtype=torch.float32)
    shared = [
        "threads=1", "progress=false", f"runs_dir={base / 'runs'}", f"model.name={base / 'model'}",
        "calibration.windows=1", "calibration.window_tokens=12", "importance=one_shot",
        "evaluate.requests=[4x32]", "evaluate.budgets=[0.8]", f"store={base / 'scores.sqlite'}",
        "workload=fixed", "workload.batch_size=4", "workload.seq_len_tokens=32",
        "workload.budget_fraction=0.8", "hydra/job_logging=none", "hydra/hydra_logging=none",
    ]  # fmt: skip
    agent = ["agent=fading_ppo", "agent.total_timesteps=64", "agent.n_envs=2",
             "agent.hyperparameters.n_steps=16"]  # fmt: skip
    folder = ["--config-dir", str(PACKAGE / "conf")]  # an option of Hydra, before all settings
    text = "evaluate.text={source: self, windows: 1, window_tokens: 12}"
    cells = [f"evaluate.baselines=['{METHOD}']", "evaluate.tasks.names=[]", text]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        for name, run, more in (("train", run_trial, agent), ("evaluate", evaluate, cells)):
            patch.setattr(sys, "argv", [name, *folder, *shared, *more])
            launch(name, run)
    return base / "runs" / "default"


def test_the_programs_train_and_evaluate_with_the_package(compared):
    (folder,) = (compared / "train").glob("fading_ppo*")
    rows = {row.method: row for row in ResultRow.read(compared / "evaluate" / "results.jsonl")}
    assert rows[METHOD].levels
    assert rows[folder.name.removesuffix("-s0")].levels
    checkpoint = checkpoint_of(folder)
    values = checkpoint.config.hyperparameters
    assert (values["last_ent_coef"], values["n_steps"]) == (0.1, 16), "from the YAML, as changed"
    model = checkpoint.load_model()
    assert type(model).__name__ == "FadingPPO"
    assert model.ent_coef < model.first_ent_coef, "the entropy bonus has faded"
    assert any(torch.isfinite(tensor).all() for tensor in model.policy.parameters())


def test_a_policy_of_a_package_answers_requests():
    memory = MemoryModel(facts())
    context = SyntheticContext([1.0] * 8)
    request = request_at(context, 2, 64, 0.7)
    chosen = load_policy("rap_example.policies:LargestFirst", memory).choose(request)
    assert memory.peak_bytes(chosen, request) <= request.budget_bytes
    assert {name.split(".")[1] for name in chosen.removed_names} == {"ffn"}, "these free most"
    baseline = make_method(METHOD, context)
    assert baseline.choose(request) == chosen
    assert baseline.source_sha256 != make_method("dense", context).source_sha256


def test_an_agent_of_a_package_needs_all_its_values():
    module, ours = "rap_example.agents:FADING_PPO", AgentConfig("maskable_ppo")
    values, policy_settings = {**ours.hyperparameters, "last_ent_coef": 0.1}, ours.policy_settings
    agent = AgentConfig(module, hyperparameters=values, policy_settings=policy_settings)
    assert agent.algorithm.cls.__name__ == "FadingPPO"
    with pytest.raises(AgentConfigError, match="FADING_PPO' lack learning_rate, .*last_ent_coef"):
        AgentConfig(module)
    with pytest.raises(AgentConfigError, match="last_ent_coef must be from 0 to 1, not 2"):
        AgentConfig(module, hyperparameters=values | {"last_ent_coef": 2})


def test_what_does_not_fit_is_named():
    with pytest.raises(PluginError, match="'rap_example.policies:LargestFirst' is a type, not an"):
        AgentConfig("rap_example.policies:LargestFirst")
    with pytest.raises(PluginError, match="called with .MemoryModel.: missing a required"):
        load_policy("rap_env.policies.loading:OrderPolicy", MemoryModel(facts()))
    with pytest.raises(InvalidRequestError, match="A str is no policy"):
        load_policy("builtins:repr", MemoryModel(facts()))


def test_a_module_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="'broken_policies:make' cannot be loaded: ModuleNotFo"):
        load_policy("broken_policies:make", MemoryModel(facts()))
    (tmp_path / "broken_policies.py").write_text("import absent_library")
    with pytest.raises(PluginError, match="No module named 'absent_library'"):
        load_policy("broken_policies:make", MemoryModel(facts()))
