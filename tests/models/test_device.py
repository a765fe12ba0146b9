import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.models import device
from rap_env.models.device import (
    choose_device,
    choose_dtype,
    device_kind,
    measured_dtype,
    remembered_dtype,
    use_threads,
)
from rap_env.paths import cache_dir
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


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_by_name(name: str) -> None:
    assert choose_dtype(name, CPU) is getattr(torch, name)


@pytest.mark.parametrize("name", ["int8", "fp16", "torch.float32"])
def test_another_dtype_is_rejected(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"dtype '{name}'; known are 'auto', 'bfloat16'"):
        choose_dtype(name, CPU)


def test_auto_dtype_is_the_cached_choice_for_this_processor(monkeypatch) -> None:
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


def test_threads_by_number_and_by_measurement(threads: int, caplog) -> None:
    with caplog.at_level("INFO"):
        assert use_threads(threads + 1) == torch.get_num_threads() == threads + 1
        assert use_threads() == torch.get_num_threads() <= (os.cpu_count() or 1)
    assert f"torch uses {threads + 1} threads." in caplog.text
    assert "Products per second by number of threads: 1: " in caplog.text
    assert f"{torch.get_num_threads()} is chosen" in caplog.text


@pytest.mark.parametrize("number", [0, -2, "two", 1.5])
def test_an_impossible_number_of_threads(number: object, threads: int) -> None:
    with pytest.raises(UnknownNameError, match=f"number of threads {number!r}; known are 'auto'"):
        use_threads(number)  # type: ignore[arg-type]
    assert torch.get_num_threads() == threads


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


@pytest.mark.parametrize(
    ("kind", "rates", "expected"),
    [
        ("cpu", (200.0, 400.0), torch.bfloat16),
        ("cpu", (200.0, 20.0), torch.float32),  # emulated
        ("cpu", (200.0, 210.0), torch.float32),  # no clear gain: the more exact one
        ("cuda:0", (100.0, 30.0, 400.0), torch.float16),  # V100, T4: bfloat16 is emulated
        ("cuda:0", (100.0, 390.0, 400.0), torch.bfloat16),  # Ampere: with the range of float32
        ("cuda:0", (100.0, 90.0, 110.0), torch.float32),
    ],
)
def test_the_clearly_faster_dtype_is_chosen(kind, rates, expected, monkeypatch, caplog) -> None:
    known = dict(zip((torch.float32, torch.bfloat16, torch.float16), rates, strict=False))
    monkeypatch.setattr(device, "_rate", lambda _device, dtype, _seconds: known[dtype])
    with caplog.at_level("INFO"):
        assert measured_dtype(torch.device(kind)) is expected
    assert f"bfloat16 {rates[1] / rates[0]:.2f}" in caplog.text


def test_one_slow_slice_does_not_decide(monkeypatch) -> None:
    disturbed = iter([1.0] * 3)

    def rate(_device: torch.device, dtype: torch.dtype, _seconds: float) -> float:
        return next(disturbed, 300.0) if dtype is torch.bfloat16 else 100.0

    monkeypatch.setattr(device, "_rate", rate)
    assert measured_dtype(CPU) is torch.bfloat16


def test_the_measurement_is_bounded_and_keeps_the_thread_count(monkeypatch) -> None:
    asked = []

    def rate(_device: torch.device, _dtype: torch.dtype, seconds: float) -> float:
        assert torch.get_num_threads() == 1
        asked.append(seconds)
        return 1.0

    monkeypatch.setattr(device, "_rate", rate)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measured_dtype(CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sum(asked) == pytest.approx(0.5)


class TestRemembered:
    """The choice in a later process, simulated by `cache_clear`."""

    @pytest.fixture(autouse=True)
    def new_process(self):
        remembered_dtype.cache_clear()
        yield
        remembered_dtype.cache_clear()

    @pytest.fixture
    def measurements(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
        """Answers of the measurement, the last one first; it fails when it has none left."""
        answers: list[torch.dtype] = []
        monkeypatch.setattr(device, "measured_dtype", lambda device: answers.pop())
        return answers

    def test_it_is_measured_once(self, measurements: list[torch.dtype]) -> None:
        measurements.append(torch.bfloat16)
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        remembered_dtype.cache_clear()
        assert remembered_dtype(CPU, "one") is torch.bfloat16

    def test_another_processor_or_torch_is_measured_again(self, measurements, monkeypatch) -> None:
        measurements += [torch.bfloat16, torch.float32, torch.bfloat16]
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        assert remembered_dtype(CPU, "two") is torch.float32
        remembered_dtype.cache_clear()
        monkeypatch.setattr(torch, "__version__", "99")
        assert remembered_dtype(CPU, "two") is torch.bfloat16
        assert len(list(cache_dir().glob("dtype-*.json"))) == 3

    @pytest.mark.parametrize("damage", ["", "{}", "nonsense"])
    def test_a_damaged_file_is_measured_again(self, damage, measurements) -> None:
        measurements += [torch.bfloat16, torch.float32]
        remembered_dtype(CPU, "one")
        (file,) = cache_dir().glob("dtype-*.json")
        file.write_text(damage)
        remembered_dtype.cache_clear()
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        remembered_dtype.cache_clear()
        assert remembered_dtype(CPU, "one") is torch.bfloat16  # replaced by the new measurement

    def test_a_cache_that_cannot_be_written_is_no_error(self, measurements, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "file"))  # no folder: nothing goes in
        measurements.append(torch.bfloat16)
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        assert remembered_dtype(CPU, "one") is torch.bfloat16  # once for each process


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
