from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.llm import device
from rap_env.llm.device import choose_device, choose_dtype, device_kind, use_threads

CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_the_cpu_without_cuda(no_cuda: None) -> None:
    assert choose_device("auto") == choose_device("cpu") == CPU


def test_auto_is_the_first_cuda_device(two_cuda: None) -> None:
    assert str(choose_device("auto")) == str(choose_device("cuda")) == "cuda:0"
    assert str(choose_device("cuda:1")) == "cuda:1"
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "gpu"])
def test_a_device_that_is_not_there(name: str, no_cuda: None) -> None:
    with pytest.raises(
        UnknownNameError, match=f"device '{name}'; known are 'auto', 'cpu'.*has no CUDA device"
    ):
        choose_device(name)


def test_a_cuda_device_too_many(two_cuda: None) -> None:
    with pytest.raises(UnknownNameError, match=r"'cuda:2'; known are 'auto', 'cpu', 'cuda:0'"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_by_name(name: str) -> None:
    assert choose_dtype(name, CPU) is getattr(torch, name)


@pytest.mark.parametrize("name", ["int8", "fp16", "torch.float32"])
def test_another_dtype_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"dtype '{name}'; known are 'auto', 'bfloat16'"):
        choose_dtype(name, CPU)


def test_auto_dtype_is_the_one_that_is_remembered_for_this_processor(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        device, "remembered_dtype", lambda *about: asked.append(about) or torch.bfloat16
    )
    assert choose_dtype("auto", CPU) is torch.bfloat16
    assert asked == [(CPU, device_kind(CPU))]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_by_number(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert use_threads(threads + 1) == torch.get_num_threads() == threads + 1
    assert f"torch uses {threads + 1} threads." in caplog.text


def test_threads_by_measurement(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert use_threads() == torch.get_num_threads() <= (os.cpu_count() or 1)
    assert "Products per second by number of threads: 1: " in caplog.text
    assert f"{torch.get_num_threads()} is chosen" in caplog.text


@pytest.mark.parametrize("number", [0, -2, "two", 1.5])
def test_an_impossible_number_of_threads(number: object, threads: int) -> None:
    with pytest.raises(UnknownNameError, match=f"number of threads {number!r}; known are 'auto'"):
        use_threads(number)  # type: ignore[arg-type]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_stays_with_the_process() -> None:
    code = """
import pathlib, sys, torch
from rap_env.llm.device import keep_freed_memory

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    keep_freed_memory()
tensor = torch.zeros(25_000_000)
before = resident()
del tensor
print((before - resident()) // 1_000_000)
"""
    for mode, given_back in (("keep", False), ("plain", True)):
        done = subprocess.run(
            [sys.executable, "-c", code, mode], capture_output=True, text=True, check=True
        )
        assert (int(done.stdout) > 90) is given_back, mode  # of 100 MB
