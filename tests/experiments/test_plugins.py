"""A policy, an agent and a baseline of another package, `tests/plugin_package`."""

import shutil
import subprocess
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
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.plugins import PluginError, entry_points
from rap_env.policies.loading import check_policy, load_policy, make_method
from tests.agents.synthetic import SyntheticContext, facts, request_at
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def installed(target, source, name):
    """Install a copy of a package into a folder, as pip does it without a network."""
    copy = target / "source" / name
    shutil.copytree(source, copy)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", target / "site", copy]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return target / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder in which the example package is installed."""
    return installed(tmp_path_factory.mktemp("plugin"), ROOT / "tests" / "plugin_package", "one")


@pytest.fixture
def package(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def compared(site, tmp_path_factory):
    """A comparison of the package's agent and baseline, made by the programs on a tiny model."""
    base = tmp_path_factory.mktemp("compared")
    tiny_model().save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    shared = [
        "threads=1", "progress=false", f"runs_dir={base / 'runs'}", f"model.name={base / 'model'}",
        "calibration.windows=1", "calibration.window_tokens=12", "importance=one_shot",
        "evaluate.requests=[4x32]", "evaluate.budgets=[0.8]", f"store={base / 'scores.sqlite'}",
        "workload=fixed", "workload.batch_size=4", "workload.seq_len_tokens=32",
        "workload.budget_fraction=0.8", "hydra/job_logging=none", "hydra/hydra_logging=none",
    ]  # fmt: skip
    agent = ["agent=fading_ppo", "agent.total_timesteps=64", "agent.n_envs=2",
             "agent.hyperparameters.n_steps=16"]  # fmt: skip
    text = "evaluate.text={source: self, windows: 1, window_tokens: 12}"
    cells = ["evaluate.baselines=[largest_first]", "evaluate.tasks.names=[]", text]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("RAP_CACHE_DIR", str(base / "cache"))
        for name, run, more in (("train", run_trial, agent), ("evaluate", evaluate, cells)):
            patch.setattr(sys, "argv", [name, *shared, *more])
            launch(name, run)
    return base / "runs" / "default"


def test_the_programs_train_and_evaluate_with_the_package(compared, package):
    (folder,) = (compared / "train").glob("fading_ppo*")
    rows = {row.method: row for row in ResultRow.read(compared / "evaluate" / "results.jsonl")}
    assert rows["largest_first"].mask
    assert rows[folder.name.removesuffix("-s0")].mask
    checkpoint = checkpoint_of(folder)
    values = checkpoint.config.hyperparameters
    assert (values["last_ent_coef"], values["n_steps"]) == (0.1, 16), "from the YAML, as changed"
    model = checkpoint.load_model()
    assert type(model).__name__ == "FadingPPO"
    assert model.ent_coef < model.first_ent_coef, "the entropy bonus has faded"
    assert any(torch.isfinite(tensor).all() for tensor in model.policy.parameters())


def test_a_policy_of_a_package_answers_requests_by_either_name(package):
    memory = MemoryModel(facts())
    context = SyntheticContext([1.0] * 8)
    request = request_at(context, 2, 64, 0.7)
    chosen = load_policy("largest", memory).choose(request)
    assert memory.peak_bytes(chosen, request) <= request.budget_bytes
    assert {name.split(".")[1] for name in chosen.removed_names} == {"ffn"}, "these free most"
    assert load_policy("rap_example.policies:LargestFirst", memory).choose(request) == chosen
    baseline = make_method("rap_example.methods:LargestFirst", context)
    assert baseline.choose(request) == chosen
    assert baseline.source_sha256 != make_method("dense", context).source_sha256


def test_an_agent_of_a_package_has_the_values_of_its_file(package):
    agent, module = AgentConfig("fading_ppo"), "rap_example.agents:FADING_PPO"
    assert agent.hyperparameters["last_ent_coef"] == 0.1
    given = {"policy_settings": agent.policy_settings, "hyperparameters": agent.hyperparameters}
    assert AgentConfig(module, **given).algorithm is agent.algorithm
    with pytest.raises(AgentConfigError, match="FADING_PPO' lack learning_rate, .*last_ent_coef"):
        AgentConfig(module)
    with pytest.raises(AgentConfigError, match="last_ent_coef must be from 0 to 1, not 2"):
        AgentConfig("fading_ppo", hyperparameters={"last_ent_coef": 2})


def test_unknown_names_list_those_of_packages(package):
    memory = MemoryModel(facts())
    with pytest.raises(UnknownNameError, match="'rap-v0'.*Did you mean 'largest'.*module:name"):
        load_policy("largets", memory)
    with pytest.raises(UnknownNameError, match="'ppo'.*Did you mean 'fading_ppo'"):
        AgentConfig("fadin_ppo")
    with pytest.raises(UnknownNameError, match="'knapsack'.*Did you mean 'largest_first'"):
        check_policy("largest_frist")


def test_what_does_not_fit_is_named_with_its_package(package):
    with pytest.raises(PluginError, match="module rap_example.policies is a type, not an agents"):
        AgentConfig("rap_example.policies:LargestFirst")
    with pytest.raises(PluginError, match="called with .MemoryModel.: missing a required"):
        load_policy("rap_env.policies.loading:OrderPolicy", MemoryModel(facts()))
    with pytest.raises(InvalidRequestError, match="A str is no policy"):
        load_policy("builtins:repr", MemoryModel(facts()))


def offer(folder, package, text):
    """A package that has only its metadata."""
    info = folder / f"{package}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(text)


def test_a_package_that_cannot_be_loaded_is_named(package, tmp_path, monkeypatch):
    offer(tmp_path, "broken", "[rap_env.policies]\nmine = broken_policies:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        PluginError, match="'mine' of the package broken 2.0 .broken_policies:make."
    ):
        load_policy("mine", MemoryModel(facts()))
    assert [plugin.conf for plugin in entry_points("policy") if plugin.name == "mine"] == [None]
    (tmp_path / "broken_policies.py").write_text("import absent_library")
    with pytest.raises(PluginError, match="No module named 'absent_library'"):
        load_policy("mine", MemoryModel(facts()))


def test_a_name_of_two_packages_is_rejected(package, tmp_path, monkeypatch):
    offer(tmp_path, "other", "[rap_env.policies]\nlargest = other_policies:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="other 2.0 and the package rap-example 0.1 both offer"):
        load_policy("largest", MemoryModel(facts()))
