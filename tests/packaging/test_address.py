"""One command writes the address of the repository into every file that names it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rap_env.version import __version__
from tests.docs.test_code_blocks import BLOCK, installable

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FIRST, SECOND = "https://github.com/first-owner/one.name", "https://github.com/other/second"

spec = importlib.util.spec_from_file_location("set_address", ROOT / "tools" / "set_address.py")
set_address = importlib.util.module_from_spec(spec)
spec.loader.exec_module(set_address)


@pytest.fixture
def copy(tmp_path):
    """The files that name the address, and the command."""
    for name in (*set_address.FILES, "tools/set_address.py", "tools/set_address.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, str(folder / "tools" / "set_address.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def texts(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in set_address.FILES}


def test_the_files_are_as_the_command_writes_them(copy):
    before = texts(copy)
    assert run(copy).returncode == 0
    assert texts(copy) == before, "run `python tools/set_address.py`"


def test_all_places_are_filled_and_a_second_address_replaces_the_first(copy):
    without = texts(copy)
    assert run(copy, FIRST).returncode == 0
    first = texts(copy)
    assert all(FIRST in text or "first-owner.github.io/one.name" in text for text in first.values())
    assert tomllib.loads(first["pyproject.toml"])["project"]["urls"]["Repository"] == FIRST
    assert yaml.safe_load(first["CITATION.cff"])["repository-code"] == FIRST
    cells = json.loads(first["examples/first_steps.ipynb"])["cells"]
    assert len([cell for cell in cells if FIRST in "".join(cell["source"])]) == 1
    assert len(first["README.md"].splitlines()) == len(without["README.md"].splitlines()) <= 80
    commands = [code for kind, code in BLOCK.findall(first["README.md"]) if kind == "bash"]
    installs = [line for line in "".join(commands).splitlines() if f"git+{FIRST}" in line]
    assert len(installs) == 2
    assert not any(installable([line.split('"')[1]]) for line in installs)

    assert run(copy, FIRST).returncode == 0
    assert texts(copy) == first
    assert run(copy).returncode == 0
    assert texts(copy) == first
    assert run(copy, SECOND).returncode == 0
    second = texts(copy)
    renamed = {n: t.replace("first-owner", "other").replace("one.name", "second")
               for n, t in first.items()}  # fmt: skip
    assert second == renamed


def test_an_address_of_another_host_is_rejected_and_changes_nothing(copy):
    before = texts(copy)
    done = run(copy, "https://example.com/rap")
    assert done.returncode == 1
    assert (
        "'https://example.com/rap' is not supported: it must be https://github.com/" in done.stderr
    )
    assert texts(copy) == before


def test_the_page_of_an_index_has_absolute_links_and_installs_by_name(copy):
    assert "There is no address yet" in run(copy, "--index").stderr
    run(copy, FIRST)
    assert run(copy, "--index").returncode == 0
    page = (copy / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert f"![Python 3.11, 3.12, 3.13]({FIRST}/raw/main/docs/images/python.svg)" in page
    assert f"{FIRST}/blob/main/LICENSE" in page
    assert 'pip install "rap-env[serve]"' in page
    assert "git+" not in page


def test_badges_and_citation_say_what_the_metadata_says():
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    badges = {name: (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
              for name in ("python", "licence")}  # fmt: skip
    assert f"<title>Python: {', '.join(versions)}</title>" in badges["python"]
    assert f"<title>Licence: {PROJECT['license']}</title>" in badges["licence"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    workflows = [(ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
                 for name in ("tests", "release")]  # fmt: skip
    for workflow in map(yaml.safe_load, workflows):
        (matrix,) = [job["strategy"]["matrix"] for job in workflow["jobs"].values()
                     if "strategy" in job]  # fmt: skip
        assert matrix["python"] == versions
