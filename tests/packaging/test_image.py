"""The image's recipe and the files beside it name what exists, and run what the command has."""

import re
from pathlib import Path

import pytest
import yaml

from rap_env.cli import serve

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations"
RECIPE = (ROOT / "Dockerfile").read_text()
SERVICES = yaml.safe_load((OPERATIONS / "compose.yaml").read_text())["services"]
OPTIONS = {option for parameter in serve.params for option in parameter.opts}


def test_the_image_is_made_of_what_the_wheel_needs_and_nothing_else():
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", RECIPE, re.MULTILINE)
              for name in line.split()]  # fmt: skip
    assert {"rap_env", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(sent) == sorted(copied)


def test_the_server_runs_without_privileges_and_its_health_is_checked():
    final = RECIPE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    assert "/livez" in final.partition("\nHEALTHCHECK ")[2]


@pytest.mark.parametrize(
    "arguments",
    [re.findall(r"--[\w-]+", RECIPE.rpartition("\nCMD ")[2]), SERVICES["rap"]["command"]],
    ids=["Dockerfile", "compose"],
)
def test_options_of_the_command_exist(arguments):
    options = {argument.partition("=")[0] for argument in arguments if argument[:2] == "--"}
    assert "--host" in options
    assert options <= OPTIONS


def test_files_that_are_mounted_exist():
    mounted = [volume.split(":")[0] for service in SERVICES.values()
               for volume in service["volumes"] if volume.startswith("./")]  # fmt: skip
    assert len(mounted) == 5
    assert all((OPERATIONS / path).is_file() for path in mounted)
    assert (OPERATIONS / SERVICES["rap"]["build"]).resolve() == ROOT
    scrape = yaml.safe_load((OPERATIONS / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": ["rap:8000"]}]
    secret = scrape["authorization"]["credentials_file"]
    assert f"--api-key-file={secret}" in SERVICES["rap"]["command"]


def test_the_systemd_unit_starts_a_server_within_its_memory_limit():
    unit = (OPERATIONS / "rap.service").read_text()
    program, command, *arguments = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)[0].split()
    assert (Path(program).name, command) == ("rap", "serve")
    assert {argument for argument in arguments if argument[:2] == "--"} <= OPTIONS
    assert arguments[arguments.index("--memory") + 1] == "auto"
    assert re.search(r"^MemoryMax=\d+[MG]$", unit, re.MULTILINE)
    folder = re.findall(r"^Environment=RAP_CACHE_DIR=/var/cache/(.*)$", unit, re.MULTILINE)
    assert re.findall(r"^CacheDirectory=(.*)$", unit, re.MULTILINE) == folder
