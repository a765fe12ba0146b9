"""The wheel has the package with its data, and metadata that an index accepts.

`make dist` installs it into an empty environment.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="build is not installed")

from rap_env.version import __version__

ROOT = Path(__file__).parents[2]
DATA_SUFFIXES = {
    ".pyi", ".json", ".gz", ".xz", ".jsonl", ".txt", ".safetensors", ".typed", ".html", ".j2",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that no old build folder gets into it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "rap_env", source / "rap_env", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = target.iterdir()
    return found


def test_the_wheel_holds_only_the_package_and_its_data_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {
        "rap_env", f"rap_env-{__version__}.dist-info",
    }  # fmt: skip
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "rap_env").rglob("*")
        if path.suffix in {".py", *DATA_SUFFIXES}
    }
    assert any(name.endswith(".safetensors") for name in wanted)
    assert wanted <= names
    other = {
        path.suffix for path in (ROOT / "rap_env").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip
    assert other <= {".py", "", *DATA_SUFFIXES}
