from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.llm import device
from rap_env.llm.device import choose_device, choose_dtype, cpu_multiplies_bfloat16

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


@pytest.mark.parametrize("fast", [True, False])
def test_auto_dtype_follows_the_hardware(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: fast)
    assert choose_dtype("auto", CPU) is wanted
    assert choose_dtype("auto", torch.device("cuda:0")) is wanted


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_bf16", True),
        ("fpu amx_tile amx_bf16", True),
        ("fpu avx2 avx512f", False),
        ("", False),
    ],
)
def test_flags_of_the_processor(
    flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags\t\t: {flags}\n")
    assert device._listed_in(cpuinfo) is expected
    assert device._listed_in(tmp_path / "none") is False
    if hasattr(torch.cpu, "get_capabilities"):
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        listed = dict.fromkeys(flags.split(), True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed)
        assert cpu_multiplies_bfloat16() is expected


@pytest.mark.skipif(
    not (Path("/proc/cpuinfo").exists() and hasattr(torch.cpu, "get_capabilities")),
    reason="only one way to ask on this machine",
)
def test_both_ways_to_ask_agree_here() -> None:
    assert cpu_multiplies_bfloat16() == device._listed_in(Path("/proc/cpuinfo"))
