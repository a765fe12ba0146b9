"""Settings: every file composes, and errors name the wrong value."""

import functools
import itertools
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from agents.algorithms import ALGORITHMS
from experiments.config import as_config
from experiments.contexts import context_config
from experiments.launch import CHOICES_FILE, CONF_DIR, register, register_program
from experiments.study.run_folder import run_label
from experiments.train import agent_config
from rap_env.errors import RapError
from rap_env.policies.registry import methods
from rap_env.scoring.generated_tasks import GENERATED_TASKS
from rap_env.workload import SAMPLERS
from tests.programs import run_python

CHOICES = yaml.safe_load(CHOICES_FILE.read_text())
FOLDERS = {
    group: {path.stem: yaml.safe_load(path.read_text()) for path in (CONF_DIR / group).glob("*")}
    for group in ("agent", "experiment")
}
GROUPS = {**CHOICES, "agent": FOLDERS["agent"]}
"""Options of each group that sets the section of its name, with their values."""
PROGRAMS = (
    "profile", "train", "evaluate", "demo", "live", "export_scores", "cgroup",
    "tight_grid",
)  # fmt: skip
PROGRAMS_AND_EXPERIMENTS = [
    (PROGRAMS[number % len(PROGRAMS)], name)
    for number, name in enumerate(sorted(FOLDERS["experiment"]))
]
NEEDED = {
    "model/custom": ["model.name=some/model"],
    "calibration/file": ["calibration.source=text.txt"],
    "workload/trace": ["workload.path=trace.csv"],
}
"""What a group's file asks the user for."""


@pytest.fixture(autouse=True, scope="module")
def hydra():
    register()
    for program in PROGRAMS:
        register_program(program)
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        yield


@functools.cache
def composed_node(program="train", *overrides):
    return compose(program, overrides=list(overrides))


def composed(program="train", *overrides):
    return as_config(composed_node(program, *overrides))


def with_values(node, *overrides):
    """What Hydra composed, with the values of some settings changed."""
    return OmegaConf.merge(node, OmegaConf.from_dotlist(list(overrides)))


def test_some_files_were_found():
    assert all(GROUPS.values())
    assert {program for program, _ in PROGRAMS_AND_EXPERIMENTS} == set(PROGRAMS)
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    assert folders == {"agent", "experiment", "grid", "hydra", "sweep"}


@pytest.mark.parametrize(("program", "experiment"), PROGRAMS_AND_EXPERIMENTS)
def test_every_program_and_experiment_composes(program, experiment):
    number = PROGRAMS_AND_EXPERIMENTS.index((program, experiment))
    agent = tuple(ALGORITHMS)[number % len(ALGORITHMS)]
    config = composed(program, f"experiment={experiment}", f"agent={agent}")
    assert agent_config(config).name == agent
    assert config.stage == program
    assert config.name == experiment
    assert context_config(config).model == config.model.name


def test_an_experiment_leaves_hyperparameters_to_the_file_of_the_agent():
    """So that each experiment runs with each agent."""
    for values in FOLDERS["experiment"].values():
        assert "hyperparameters" not in values.get("agent", {})


OLD_LADDER = (
    "demo",
    "table",
    *(n for n in FOLDERS["experiment"] if n.startswith("tight") and n != "tight_low_bits"),
)


@pytest.mark.parametrize("experiment", OLD_LADDER)
def test_experiments_with_records_of_four_bits_name_their_ladder(experiment):
    config = composed("train", f"experiment={experiment}")
    assert (config.env.levels == "four-bits") == (config.env.id == "RAPLadder-v0")
    assert config.workload.get("levels", "four-bits") == "four-bits"


@pytest.mark.parametrize("number", range(max(map(len, GROUPS.values()))))
def test_every_option_of_every_group_composes(number):
    """The first options of all groups compose together, then the second ones, and so on."""
    names = {group: sorted(options)[number % len(options)] for group, options in GROUPS.items()}
    needed = [NEEDED.get(f"{group}/{name}", []) for group, name in names.items()]
    chosen = [f"{group}={name}" for group, name in names.items()]
    config = composed("train", *chosen, *itertools.chain(*needed))
    for group, name in names.items():
        assert_has(getattr(config, group), GROUPS[group][name], group)
    assert agent_config(config).name == config.agent.name


def assert_has(section, values, group):
    values = values.get("_global_", {group: values})[group]  # an option may set other sections too
    for key in values.keys() - {"defaults"}:
        value = values[key]
        own = section[key] if isinstance(section, dict) else getattr(section, key)
        if value not in ("???", "auto", "${env.levels}") and not isinstance(value, dict):
            assert own == value


@pytest.mark.parametrize("choice", sorted(NEEDED))
def test_missing_values_of_a_file_must_be_given(choice):
    node = composed_node("train", *(choice.replace("/", "=", 1) for choice in NEEDED))
    given = [needed for other, needed in NEEDED.items() if other != choice]
    with pytest.raises(MissingMandatoryValue, match=NEEDED[choice][0].split("=")[0]):
        as_config(with_values(node, *itertools.chain(*given)))


def test_names_in_the_files_exist():
    agents = {name: agent_config(composed("train", f"agent={name}")) for name in GROUPS["agent"]}
    assert {agent.name for agent in agents.values()} == set(ALGORITHMS)
    for name, agent in agents.items():
        own = GROUPS["agent"][name]["hyperparameters"]
        assert own.items() <= agent.hyperparameters.items(), "the file's values are used"
    assert {values["name"] for values in GROUPS["workload"].values()} == set(SAMPLERS)
    assert set(GROUPS["workload"]) >= set(SAMPLERS)
    for experiment in ("demo", "learning"):
        settings = composed("evaluate", f"experiment={experiment}")
        evaluate = settings.evaluate
        assert set(evaluate.baselines) <= set(methods())
        assert set(evaluate.tasks.names) <= set(GENERATED_TASKS)


def test_null_takes_the_value_of_the_agent_file():
    changed = ("agent.hyperparameters.learning_rate=0.01", "agent.hyperparameters.gamma=null")
    given = agent_config(composed("train", *changed)).hyperparameters
    defaults = agent_config(composed()).hyperparameters
    assert given == {**defaults, "learning_rate": 0.01}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("agnet=ppo", "agnet"),
        ("evaluate.budget=[0.9]", "budget"),
        ("agent.hyperparameters.lr=1", "lr"),
        ("agent=pppo", "agent/pppo"),
        ("agent.total_timesteps=many", "agent.total_timesteps"),
        ("tight_grid.losses=[a]", "tight_grid.losses"),
    ],
)
def test_a_misspelt_key_or_wrong_type_is_named(override, named):
    with pytest.raises(ConfigCompositionException) as caught:
        composed("train", override)
    assert named in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("agent.total_timesteps=0", "agent.total_timesteps"),
        ("evaluate.budgets=[1.2]", "evaluate.budgets"),
        ("tight_grid.losses=[]", "tight_grid.losses"),
        ("evaluate.requests=[8by16]", "evaluate.requests"),
        ("score_model.pessimism=.nan", "score_model.pessimism"),
        ("importance.method=gis", "'gsi'"),
        ("name=a/b", "folder name"),
    ],
)
def test_an_impossible_value_is_named(override, named):
    with pytest.raises(RapError, match=re.escape(named)):
        as_config(with_values(composed_node(), override))


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        (("train", "dqn", 1), "dqn-s1"),
        (("train", "dqn", 1, "agent=dqn,seed=1"), "dqn-s1"),
        (("train", "ppo", 2, "agent=ppo,calibration.windows=4,seed=2"), "ppo-windows=4-s2"),
        (("train", "ppo", 0, "agent.total_timesteps=128"), "ppo-total_timesteps=128-s0"),
        (("train", "rap", 0, "agent=dqn"), "rap-agent=dqn-s0"),
        (("train", "rap", 0, "agent.label=rap,seed=0"), "rap-s0"),
        (("train", "ppo", 2, "workload.budget_fraction_range=[0.6,0.7],seed=2"),
         "ppo-budget_fraction_range=_0.6_0.7-s2"),
        (("evaluate", "ppo", 0, "evaluate.budgets=[0.9],seed=1"), "budgets=_0.9_-seed=1"),
        (("profile", "ppo", 0, "model=other,seed=1"), "model=other-seed=1"),
        (("profile", "ppo", 0, "name=x"), "profile"),
    ],
)  # fmt: skip
def test_runs_are_named_after_what_varies(arguments, label):
    assert run_label(*arguments) == label


def test_names_fit_a_file_system_and_are_distinct():
    overrides = ",".join(f"agent.hyperparameters.setting_number_{i}={i}" for i in range(30))
    first, second = (run_label("train", "ppo", 0, o) for o in (overrides, f"{overrides}9"))
    assert first != second
    assert max(len(first), len(second)) < 255
    assert first.startswith("ppo-setting_number_0=0-setting_number_1=1-")


def run_program(*arguments, cwd):
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    return run_python("-m", *arguments, cwd=cwd, timeout=120, env=environment)


def test_a_mistake_ends_in_one_sentence_and_exit_code_2(tmp_path):
    done = run_program("experiments.evaluate", "name=nothing", cwd=tmp_path)
    assert done.returncode == 2
    logged, error = done.stderr.strip().splitlines()
    assert "torch uses " in logged
    assert error.startswith("Error: There is nothing to evaluate: no finished training in")
    assert (tmp_path / "runs" / "nothing" / "evaluate").is_dir(), "it is the default one"


def test_a_selection_text_can_be_given_on_the_command_line():
    assert composed().evaluate.selection_text is None
    assert composed("train", "evaluate.selection=null").evaluate.selection_text is None
    given = composed("train", "evaluate.selection={source: wiki.jsonl, field: page, windows: 16}")
    assert given.evaluate.selection_text.source == "wiki.jsonl"
    assert given.evaluate.selection_text.windows == 16
