from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rap_env.llm import device
from rap_env.llm.device import measured_dtype, products_per_second, remembered_dtype
from rap_env.paths import cache_dir

CPU = torch.device("cpu")


def _rate(bfloat16: float, float32: float) -> device.ProductRate:
    found = {torch.bfloat16: bfloat16, torch.float32: float32}
    return lambda dtype, seconds: found[dtype]


@pytest.mark.parametrize(
    ("bfloat16", "float32", "expected"),
    [
        (400.0, 200.0, torch.bfloat16),
        (20.0, 200.0, torch.float32),  # emulated
        (210.0, 200.0, torch.float32),  # no clear gain: the more exact one
    ],
)
def test_the_clearly_faster_dtype_is_chosen(
    bfloat16: float,
    float32: float,
    expected: torch.dtype,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        assert measured_dtype(CPU, _rate(bfloat16, float32)) is expected
    assert f"bfloat16 {bfloat16 / float32:.2f} times as fast as float32" in caplog.text


def test_one_slow_slice_does_not_decide() -> None:
    disturbed = iter([1.0] * 3)

    def rate(dtype: torch.dtype, seconds: float) -> float:
        return next(disturbed, 300.0) if dtype is torch.bfloat16 else 100.0

    assert measured_dtype(CPU, rate) is torch.bfloat16


def test_the_measurement_takes_half_a_second_in_all_and_leaves_the_threads_alone() -> None:
    asked = []

    def rate(dtype: torch.dtype, seconds: float) -> float:
        assert torch.get_num_threads() == 1
        asked.append(seconds)
        return 1.0

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measured_dtype(CPU, rate)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sum(asked) == pytest.approx(0.5)


def test_a_real_measurement_picks_what_the_faster_rate_says() -> None:
    found: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    real = device._rate_on(CPU)

    def rate(dtype: torch.dtype, seconds: float) -> float:
        found[dtype].append(real(dtype, seconds))
        return found[dtype][-1]

    chosen = measured_dtype(CPU, rate)
    gain = max(found[torch.bfloat16]) / max(found[torch.float32])
    assert chosen is (torch.bfloat16 if gain > device.CLEAR_GAIN else torch.float32)


def test_the_rate_is_the_work_done_in_a_second() -> None:
    small, large = torch.ones(8, 8), torch.ones(400, 400)
    assert products_per_second(small, small, 0.02) > products_per_second(large, large, 0.02) > 0


class TestRemembered:
    """What a later process finds; `cache_clear` stands for its start."""

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

    def test_another_processor_or_torch_is_measured_again(
        self, measurements: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measurements += [torch.bfloat16, torch.float32, torch.bfloat16]
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        assert remembered_dtype(CPU, "two") is torch.float32
        remembered_dtype.cache_clear()
        monkeypatch.setattr(torch, "__version__", "99")
        assert remembered_dtype(CPU, "two") is torch.bfloat16
        assert len(list(cache_dir().glob("dtype-*.json"))) == 3

    @pytest.mark.parametrize("damage", ["", "{}", "nonsense"])
    def test_a_damaged_file_is_measured_again(
        self, damage: str, measurements: list[torch.dtype]
    ) -> None:
        measurements += [torch.bfloat16, torch.float32]
        remembered_dtype(CPU, "one")
        (file,) = cache_dir().glob("dtype-*.json")
        file.write_text(damage)
        remembered_dtype.cache_clear()
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        remembered_dtype.cache_clear()
        assert remembered_dtype(CPU, "one") is torch.bfloat16  # mended by now

    def test_a_cache_that_cannot_be_written_is_no_error(
        self, measurements: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "file"))  # no folder: nothing goes in
        measurements.append(torch.bfloat16)
        assert remembered_dtype(CPU, "one") is torch.bfloat16
        assert remembered_dtype(CPU, "one") is torch.bfloat16  # once for each process
