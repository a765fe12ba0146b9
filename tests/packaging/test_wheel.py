"""The wheel works by itself in a virtual environment outside the checkout."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="build is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from rap_env.version import __version__

ROOT = Path(__file__).parents[2]
DATA_SUFFIXES = {".pyi", ".json", ".gz", ".jsonl", ".txt", ".safetensors", ".typed", ".html", ".j2"}


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


class Installed:
    """A virtual environment that holds the wheel; its dependencies are those of this Python.

    Args:
        folder: An empty folder outside the checkout.
        wheel: The wheel.
    """

    def __init__(self, folder, wheel):
        self.folder = folder
        venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        self.bin = venv / "bin"
        self.python = str(self.bin / "python")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        command = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(command, check=True)
        # As a path line, not as a site folder: the editable install of the checkout stays out.
        here = sysconfig.get_paths()["purelib"]
        (self.site,) = venv.glob("lib/python*/site-packages")
        (self.site / "dependencies.pth").write_text(f"{here}\n")
        unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {k: v for k, v in os.environ.items() if k not in unwanted} | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAP_CACHE_DIR": str(folder / "cache"),
        }

    def run(self, *command, code=0):
        """Output of a command that ends with a status."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def rap(self, *arguments, code=0):
        """Output of the console command."""
        return self.run(str(self.bin / "rap"), *arguments, code=code)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("outside"), wheel)


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


def test_its_metadata_has_the_extras_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"rap_env-{__version__}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode()
    extras = set(re.findall(r"Provides-Extra: (\S+)", metadata))
    assert extras == {"eval", "model", "plots", "serve", "structured"}
    assert "rap = rap_env.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_twine_check_passes(wheel):
    pytest.importorskip("twine", reason="twine is not installed")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_environment_passes_gymnasiums_checker(installed, model_folder):
    code = """if True:
        import sys
        import gymnasium, rap_env, torch
        from gymnasium.utils.env_checker import check_env
        torch.set_num_threads(1)
        print(rap_env.__file__)
        env = gymnasium.make(
            "RAPPrune-v0", model=sys.argv[1], dtype="float32", importance="one_shot",
            calibration={"source": "self", "windows": 1, "window_tokens": 8},
            workload={
                "name": "fixed", "batch_size": 2, "seq_len_tokens": 16, "budget_fraction": 0.8
            },
        )
        check_env(env.unwrapped, skip_render_check=True)
        _, info = env.reset(seed=0)
        print(sorted(info))
    """
    done = installed.run(installed.python, "-W", "ignore", "-c", code, str(model_folder))
    place, keys = done.stdout.strip().splitlines()
    assert Path(place).is_relative_to(installed.site)
    assert "peak_bytes" in keys


@pytest.mark.slow
def test_rap_choose_and_info_need_no_model(installed):
    assert installed.rap("--version").stdout == f"rap, version {__version__}\n"
    answer = json.loads(
        installed.rap("choose", "--batch", "8", "--seq", "2048", "--budget", "300MiB",
                      "--json").stdout
    )  # fmt: skip
    assert answer["fits"]
    assert answer["peak_bytes"] <= 300 * 2**20
    found = json.loads(installed.rap("info", "--json").stdout)
    assert found["rap_env"] == __version__
    assert found["cache"]["folder"] == str(installed.folder / "cache")


@pytest.mark.slow
def test_rap_serves_a_model_over_http(installed, model_folder):
    command = [str(installed.bin / "rap"), "serve", "--port", "0", "--policy", "dense",
               "--model-name", "tiny", "--dtype", "float32", "--threads", "1",
               "--model", str(model_folder), "--memory", "2GiB"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=installed.folder, env=installed.environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.lstrip().startswith("curl "):
                break
        url = re.search(r"http://[\d.]+:\d+", "".join(lines))
        assert url, "".join(lines)
        message = {"role": "user", "content": "ab"}
        body = {"model": "tiny", "messages": [message], "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{url[0]}/v1/chat/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert answer["model"] == "tiny"
        tokens = answer["usage"]["completion_tokens"]
        assert 1 <= tokens <= 4
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert f"Ended: 1 answer with {tokens} token" in rest
    finally:
        process.kill()
