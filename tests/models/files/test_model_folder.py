"""Model folders that are made in a process of their own."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.files.model_folder import (
    file_states,
    in_child,
    is_intact,
    made_apart,
    made_once,
    manifest_source,
    remembered,
)


def fill(folder: Path) -> dict[str, int]:
    (folder / "config.json").write_text("{}")
    return {"process": os.getpid()}


def refuse(name: str, folder: Path) -> dict[str, int]:
    (folder / "config.json").write_text("{")
    raise UnsupportedModelError(f"{name} is not known.")


def be_killed(_: Path) -> dict[str, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_folder_is_made_in_another_process_only_where_that_is_wanted(tmp_path, caplog):
    caplog.set_level("INFO")
    with made_apart():
        apart = made_once(tmp_path / "apart", fill, "Making it")
        assert made_once(tmp_path / "apart", be_killed, "Making it again") == apart
    here = made_once(tmp_path / "here", fill, "Making it here")
    assert is_intact(apart)
    assert is_intact(here)
    assert manifest_source(here) == {"process": os.getpid()} != manifest_source(apart)
    assert caplog.messages == ["Making it", "Making it here"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (functools.partial(refuse, "Tiny"), UnsupportedModelError, "^Tiny is not known."),
        (be_killed, ModelNotAvailableError, "was ended from outside; is there enough memory"),
    ],
)
def test_an_error_in_that_process_is_the_callers_and_leaves_nothing(tmp_path, make, error, message):
    with made_apart(), pytest.raises(error, match=message):
        made_once(tmp_path / "models" / "failed", make, "Making it")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".failed.lock"]


def test_a_script_without_a_guard_runs_once_and_its_child_prints_elsewhere(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rap_env.models.files.model_folder import in_child\n"
        "print('began', flush=True)\n"
        "in_child(print, 'from the child')\n"
        "print(in_child(pow, 2, 5))\n"
    )
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ran.stdout == "began\n32\n"
    assert ran.stderr == "from the child\n"


def test_an_error_of_another_process_says_where_it_arose(tmp_path):
    with pytest.raises(ZeroDivisionError) as raised:
        in_child(divmod, 1, 0)
    assert "in _answer" in raised.value.__notes__[0]


def test_a_hash_is_remembered_for_the_state_of_its_file(lonely: Path, tmp_path: Path) -> None:
    path, made = tmp_path / "file", []

    def hashed() -> str:
        made.append(path.read_text())
        return f"hash of {made[-1]}"

    path.write_text("one")
    for content, expected in (("one", 1), ("one", 1), ("other", 2)):
        if path.read_text() != content:
            path.write_text(content)
        assert remembered(file_states(path), hashed) == f"hash of {content}"
        assert len(made) == expected
