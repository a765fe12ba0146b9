"""The base install is small, and what it promises works without any further package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rap_env.extras import EXTRAS, require_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MOST_DISTRIBUTIONS = 8
"""Distributions that ``pip install rap-env`` brings, itself not counted."""

FINDER = """
import sys

class OnlyTheBaseInstall:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {modules!r} and top not in sys.stdlib_module_names:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [OnlyTheBaseInstall(list(sys.meta_path))]
"""

ENVIRONMENT = """
import gymnasium, numpy, rap_env
for name in ("RAPLadder-v0", "RAPPrune-v0"):
    env = gymnasium.make(name, model="score_table:smollm2-135m", render_mode="rgb_array")
    env.reset(seed=0)
    over = False
    while not over:
        action = numpy.flatnonzero(env.unwrapped.action_masks())[0]
        _, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    assert reward < 0 and env.render().ndim == 3
envs = gymnasium.make_vec("RAPLadder-v0", num_envs=2, model="score_table:smollm2-135m")
envs.reset(seed=0)
envs.step(envs.action_space.sample())
"""

EVALUATION = """
task = max(name for name in gymnasium.registry if name.startswith("RAPLadder/SmolLM2-Table"))
result = rap_env.evaluate(rap_env.load_policy("rap"), task, "test", name="mine")
assert 0 < result.mean_delta_nll < 1
assert len(str(result).splitlines()) > 3
"""


def brought_along(name: str) -> set[str]:
    """The distributions that a requirement installs here, itself included."""
    names = {canonicalize_name(name)}
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names |= brought_along(requirement.name)
    return names


BASE = set().union(*(brought_along(Requirement(r).name) for r in PROJECT["dependencies"]))


def in_base_install(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that finds only the modules of the base install."""
    by_module = metadata.packages_distributions().items()
    modules = {module for module, names in by_module if BASE & {*map(canonicalize_name, names)}}
    program = FINDER.replace("{modules!r}", repr(modules | {"rap_env"})) + code
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_base_install_is_small_and_has_no_torch():
    assert len(BASE) <= MOST_DISTRIBUTIONS, BASE
    assert {"gymnasium", "numpy"} <= BASE
    assert not BASE & {"torch", "transformers"}


EACH = """
import contextlib, io, json, sys, traceback
import rap_env
from rap_env.cli import main

ended = []
for code in {codes!r}:
    status, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            exec(code)
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            status = 1
            traceback.print_exc()
    ended.append([status, output.getvalue(), errors.getvalue()])
print(json.dumps(ended))
"""
"""Runs codes in turn and prints the status, output and errors of each."""


def each_in_base_install(*codes: str) -> list[tuple[int, str, str]]:
    """The status, output and errors of codes that run in one such process."""
    done = in_base_install(EACH.replace("{codes!r}", repr(codes)))
    assert done.returncode == 0, done.stderr
    return list(map(tuple, json.loads(done.stdout)))


def test_the_environment_on_a_table_needs_nothing_else():
    done = in_base_install(ENVIRONMENT + EVALUATION)
    assert done.returncode == 0, done.stderr


def test_commands_without_a_live_model_need_nothing_else():
    request = ["choose", "--batch=8", "--seq=2048", "--budget=300MiB"]
    commands = [*request, "--policy=rap"], ["info"]
    for status, output, errors in each_in_base_install(*(f"main({c!r})" for c in commands)):
        assert status == 0, errors
        assert "MiB" in output
        assert not errors


def test_a_missing_extra_is_one_error_with_the_command_that_installs_it():
    extras = {
        "rap_env.load_llm": "model",
        "import rap_env.models.files.loading": "model",
        "import gymnasium; gymnasium.make('RAPPrune-v0', model='smollm2-135m')": "model",
        "main(['fetch'])": "model",
        "main(['prune', 'x', '--remove=layer01.ffn'])": "model",
        "main(['serve'])": "serve",
    }
    for extra, ended in zip(extras.values(), each_in_base_install(*extras), strict=True):
        status, _, errors = ended
        assert status in (1, 2)
        last = errors.splitlines()[-1]
        assert re.search(rf'needs the package .*`pip install "rap-env\[{extra}\]"`\.$', last), last


def test_every_extra_has_its_modules_and_requires_what_it_needs():
    assert EXTRAS.keys() == PROJECT["optional-dependencies"].keys()
    for extra, lines in PROJECT["optional-dependencies"].items():
        names = {Requirement(line).name.replace("-", "_").replace("pyyaml", "yaml")
                 for line in lines} - {"rap_env"}  # fmt: skip
        assert set(EXTRAS[extra]) <= names
        require_extra(extra, "This test")
    for extra in ("serve", "eval", "structured"):
        assert "rap-env[model]" in PROJECT["optional-dependencies"][extra]
