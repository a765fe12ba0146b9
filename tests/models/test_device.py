import mmap
import platform
import subprocess
import sys

import pytest
import torch

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.models import device
from rap_env.models.device import (
    choose_device,
    choose_dtype,
    use_threads,
)
from rap_env.runtime.memory_meter import resident_bytes

CPU = torch.device("cpu")


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with as many CUDA devices as the parameter says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("cuda_devices", "name", "chosen"),
    [
        (0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda:0"), (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu"),
    ],
    indirect=["cuda_devices"],
)  # fmt: skip
def test_a_device_by_name(cuda_devices: None, name: str, chosen: str) -> None:
    assert str(choose_device(name)) == chosen


@pytest.mark.parametrize(
    ("cuda_devices", "name", "known"),
    [
        *((0, name, "'auto', 'cpu'.*has no CUDA device") for name in ("cuda", "cuda:0", "gpu")),
        (2, "cuda:2", "'auto', 'cpu', 'cuda:0'"),
    ],
    indirect=["cuda_devices"],
)
def test_a_missing_device_is_rejected(cuda_devices: None, name: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=f"device '{name}'; known are {known}"):
        choose_device(name)


@pytest.mark.parametrize("name", ["int8", "fp16", "torch.float32"])
def test_another_dtype_is_rejected(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"dtype '{name}'; known are 'auto', 'bfloat16'"):
        choose_dtype(name, CPU)


@pytest.mark.parametrize(
    ("kind", "has", "expected"),
    [
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False}, torch.float32),  # emulated
        ("cpu", {}, torch.float32),
        ("cuda:0", (9, 0), torch.bfloat16),
        ("cuda:0", (8, 0), torch.bfloat16),
        ("cuda:0", (7, 5), torch.float16),  # V100, T4: bfloat16 is emulated
        ("cuda:0", (6, 1), torch.float32),
        ("meta", {}, torch.float32),
    ],
)
def test_the_automatic_dtype_has_instructions_of_the_processor(kind, has, expected, monkeypatch):
    monkeypatch.setattr(device, "cpu_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: has)
    assert choose_dtype("auto", torch.device(kind)) is expected


def test_threads_by_number(caplog) -> None:
    before = torch.get_num_threads()
    try:
        with caplog.at_level("INFO"):
            assert use_threads(before + 1) == torch.get_num_threads() == before + 1
        assert f"torch uses {before + 1} threads." in caplog.text
        with pytest.raises(InvalidRequestError, match="must be at least 1, not 0"):
            use_threads(0)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
@pytest.mark.slow
def test_freed_memory_stays_with_the_process() -> None:
    code = """
import pathlib, sys, torch
from rap_env.models.device import free_memory_early, keep_freed_memory

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

modes = {"keep": [keep_freed_memory], "early": [keep_freed_memory, free_memory_early], "plain": []}
for call in modes[sys.argv[1]]:
    call()
tensor = torch.zeros(25_000_000)
before = resident()
del tensor
print((before - resident()) // 1_000_000)
"""
    for mode, given_back in (("keep", False), ("early", True), ("plain", True)):
        done = subprocess.run(
            [sys.executable, "-c", code, mode], capture_output=True, text=True, check=True
        )
        assert (int(done.stdout) > 90) is given_back, mode  # of 100 MB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_mapped_files_leave_resident_memory_and_written_ones_stay(tmp_path) -> None:
    path, size = tmp_path / "library", 32 * 2**20
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        read = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
        own = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    own[:5] = b"mine!"
    assert read[:: mmap.PAGESIZE].count(b"x") == size // mmap.PAGESIZE
    before = resident_bytes()[1]
    device.drop_unused_pages()
    assert before - resident_bytes()[1] > 24 * 2**20
    assert read[:: mmap.PAGESIZE].count(b"x") == size // mmap.PAGESIZE
    assert own[:6] == b"mine!x"
