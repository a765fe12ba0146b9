"""The benchmark of exported plans in other engines."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import engines
from experiments.study.experiment_errors import ExperimentError
from tests.models.tiny_gguf import write_tiny_gguf


def test_every_benchmark_has_a_docstring_and_stands_in_the_makefile():
    lines = Path("Makefile").read_text().splitlines()
    listed = next(line for line in lines if line.startswith("BENCHMARKS :=")).split(":=")[1].split()
    modules = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    assert all(importlib.import_module(f"benchmarks.{name}").__doc__ for name in modules)
    programs = {
        name for name in modules if hasattr(importlib.import_module(f"benchmarks.{name}"), "main")
    }
    assert set(listed) == programs


def test_without_llama_cpp_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install llama-cpp-py-sync"):
        engines.main(engines.EnginesSettings())


def test_a_run_on_a_tiny_model_ends_in_a_record(tmp_path):
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    before = torch.get_num_threads()
    write_tiny_gguf(tmp_path / "in.gguf", kind="Q4_1", hidden=64, ffn=96, layers=6)
    settings = engines.EnginesSettings(
        repeats=1, threads=1, results_dir=str(tmp_path), model=str(tmp_path / "in.gguf"),
        new_tokens=8,
    )  # fmt: skip
    engines.main(settings)
    torch.set_num_threads(before)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    agreement = record["measured"]["agreement"]["llama.cpp"]
    assert set(agreement) == set(engines.masks_of(6))
    for name, cell in agreement.items():
        assert cell["equal_prompts"] == cell["prompts"] == 8, name
        assert cell["nll_apart"] < 1e-5
    met = {target["what"]: target["met"] for target in record["targets"]}
    assert met["llama.cpp: prompts whose 8 tokens are ours"]
