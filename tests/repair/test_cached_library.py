"""Stub libraries opened by name or path: fitted once, cached, rejected if damaged."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.files.streamed import stream_llm
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.repair import cached_library
from rap_env.repair.cached_library import open_library
from rap_env.repair.config import repair_label
from rap_env.repair.fitting import fit_library
from rap_env.repair.stub_library import StubLibrary
from rap_env.request import Request
from rap_env.scoring.corpus_loading import load_corpus
from tests.models.states import saved
from tests.programs import PythonProgram
from tests.tiny import tiny_llm, tiny_tokenizer


def kept_files():
    return sorted(cache_dir().glob("repair/*/*.safetensors"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def short(monkeypatch):
    """Less text, where only what becomes of the file matters."""
    monkeypatch.setattr(
        cached_library, "TEXT", replace(cached_library.TEXT, windows=4, window_tokens=16)
    )
    monkeypatch.setattr(cached_library, "HELD_BACK", replace(cached_library.HELD_BACK, windows=2))


def test_the_library_matches_its_text_and_settings():
    llm = tiny_llm()
    found = open_library("library", llm)
    texts = [found.provenance[name] for name in ("text", "held_back")]
    assert [(t["source"], t["role"], t["seed"], t["windows"]) for t in texts] == [
        ("self", "calibration", 0, 64),
        ("self", "selection", 0, 16),
    ]
    assert {t["window_tokens"] for t in texts} == {64}  # the positions of the tiny model
    text, held_back = (load_corpus(config, llm) for config in cached_library._texts(llm))
    assert fit_library(llm, text, held_back, progress=False).sha256 == found.sha256


def test_it_is_fitted_once_for_each_model(short, monkeypatch):
    llm = tiny_llm()
    first = open_library("library", llm)
    open_library("library", tiny_llm(seed=1))
    assert len(kept_files()) == 2
    monkeypatch.setattr(cached_library, "fit_library", None)  # fitting again would fail
    again = open_library("library", tiny_llm())
    assert again.sha256 == first.sha256
    with pytest.raises(TypeError):
        open_library("library", tiny_llm(seed=2))


def test_a_path_is_read_and_nothing_is_fitted(short, tmp_path):
    library = open_library("library", tiny_llm())
    library.save(tmp_path / "mine.safetensors")
    before = kept_files()
    found = open_library(str(tmp_path / "mine.safetensors"), tiny_llm(seed=3))
    assert found.sha256 == library.sha256
    assert kept_files() == before


@pytest.mark.parametrize("name", ["libary", "no/such/file.safetensors", "."])
def test_an_unknown_repair_setting_is_rejected(name):
    with pytest.raises(
        UnknownNameError, match=r"repair .*'library', 'none'.*path of a stub library"
    ):
        open_library(name, tiny_llm())


def test_a_damaged_file_is_made_again(short, caplog):
    llm = tiny_llm()
    first = open_library("library", llm)
    (path,) = kept_files()
    path.write_bytes(path.read_bytes()[:-50])
    assert open_library("library", llm).sha256 == first.sha256
    assert "is damaged; it is created again" in caplog.text


def test_blocks_that_a_pruned_checkpoint_lacks_have_no_stub(short, tmp_path):
    llm = tiny_llm(layers=3, tokenizer=tiny_tokenizer())
    save_pruned(llm, Plan.removing(1, 2), tmp_path / "pruned")
    pruned = load_pruned(tmp_path / "pruned")
    view = open_library("library", pruned).attach(pruned)
    assert [index for index, count in enumerate(view.facts.stub_bytes) if not count] == [1, 2]
    assert min(MemoryModel(view).freed_bytes(Request(1, 8, 1))) >= 0


def test_a_model_that_is_streamed_has_the_stubs_of_the_whole_one(short, tmp_path):
    saved(tmp_path / "model", dtype=torch.float32)
    whole = load_llm(tmp_path / "model", dtype="float32", device="cpu")
    streamed = stream_llm(tmp_path / "model", max_memory_bytes=10**6, dtype="float32", device="cpu")
    expected = open_library("library", whole)
    for path in kept_files():
        path.unlink()
    assert open_library("library", streamed).sha256 == expected.sha256


def print_digest():
    """In a process of its own: open the library, and print its digest."""
    torch.set_num_threads(1)
    cached_library.TEXT = replace(cached_library.TEXT, windows=4, window_tokens=16)
    cached_library.HELD_BACK = replace(cached_library.HELD_BACK, windows=2)
    print(open_library("library", tiny_llm()).sha256)


def fit_and_hang():
    """In a process of its own: fit the library, print a line, and do not finish to save it."""

    def save(self, path):
        path.write_bytes(b"half")
        print("half", flush=True)
        time.sleep(600)

    StubLibrary.save = save
    print_digest()


def process_of(function):
    code = f"from {__name__} import {function.__name__} as run; run()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return PythonProgram(["-c", code], env=environment, stdout=subprocess.PIPE)


def test_concurrent_processes_and_a_kill_leave_one_complete_file(short):
    killed = process_of(fit_and_hang)
    assert killed.stdout.readline() == "half\n"
    others = [process_of(print_digest) for _ in range(2)]
    killed.kill()
    found = {process.communicate(120)[0].strip() for process in others}
    killed.wait(120)
    assert found == {open_library("library", tiny_llm()).sha256}
    (path,) = kept_files()
    folder = path.parent
    assert {file.name for file in folder.parent.iterdir()} == {
        folder.name,
        f".{folder.name}.lock",
    }


def test_records_name_a_file_without_its_path():
    assert repair_label("none") == "none"
    assert repair_label("library") == "library"
    assert repair_label(str(Path.home() / "runs" / "stubs.safetensors")) == "runs/stubs.safetensors"
