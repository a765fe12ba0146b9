import sys
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from benchmarks.measuring import Settings, alternate, measured_peak, ratios, spread
from experiments.study.console import run_with_settings
from rap_env.errors import InvalidRequestError

CPU = torch.device("cpu")
KIB = 1024


@dataclass
class _Settings(Settings):
    batch_size: int = 3


def _floats(kib: int) -> torch.Tensor:
    return torch.ones(kib * KIB // 4)


def _given(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *words])


def test_settings_come_from_the_command_line(monkeypatch):
    settings: list[_Settings] = []
    _given(monkeypatch, "batch_size=4", "threads=1")
    run_with_settings(_Settings, settings.append)
    assert settings == [_Settings(batch_size=4, threads=1)]


def _reject(settings: _Settings) -> None:
    raise InvalidRequestError(f"No batch of {settings.batch_size}.")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch_sise=4", "Key 'batch_sise' not in '_Settings'"),
        ("batch_size=many", "Value 'many'"),
        ("batch_size", "None"),
        ("repeats=0", "repeats must be at least 1, not 0"),
        ("batch_size=0", "Error: No batch of 0.\n"),
    ],
)
def test_a_wrong_setting_gives_a_short_error(word, message, monkeypatch, capsys):
    _given(monkeypatch, word)
    with pytest.raises(SystemExit) as ended:
        run_with_settings(_Settings, _reject)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert message in said
    late = "known are repeats, threads, results_dir, batch_size" not in said
    assert late == (word == "batch_size=0")


def test_help_says_what_is_measured_and_lists_the_settings(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "What this measures.")
    _given(monkeypatch, "--help", "batch_size=2")
    run_with_settings(_Settings, _reject)
    said = capsys.readouterr().out
    assert said.startswith("What this measures.\n")
    assert "\nrepeats: 5\n" in said
    assert "\nbatch_size: 3\n" in said


def test_sides_take_turns_after_the_warm_up():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = alternate(sides, repeats=3, warm_up=2)
    assert "".join(calls) == "ABAB" + "ABABAB"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}
    assert all(value > 0 for side in seconds.values() for value in side)


def test_spread_and_paired_ratios():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "repeats": 3}
    # Paired: the ratio of the medians would be 4 / 2 = 2.
    assert ratios([4.0, 2.0, 9.0], [4.0, 2.0, 1.0])["median"] == 1.0
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


class TestMeasuredPeak:
    def test_it_counts_simultaneously_live_tensors_allocated_inside(self):
        before = _floats(64)
        with measured_peak(CPU) as measured:
            first = _floats(8)
            second = _floats(4)
            del first
            third = _floats(2)
        assert measured.peak_bytes == 12 * KIB
        assert (second.numel(), third.numel()) == (KIB, KIB // 2)
        assert before.numel() == 16 * KIB

    def test_temporary_tensors_inside_an_operation_count(self):
        logits, targets = torch.randn(64, 100), torch.zeros(64, dtype=torch.long)
        with measured_peak(CPU) as measured:
            functional.cross_entropy(logits, targets)
        assert measured.peak_bytes >= logits.numel() * 4  # log-probabilities, not returned

    def test_an_error_in_the_block_propagates_and_the_next_measurement_works(self):
        with pytest.raises(ZeroDivisionError), measured_peak(CPU):
            1 / 0  # noqa: B018
        with measured_peak(CPU) as measured:
            _floats(8)
        assert measured.peak_bytes == 8 * KIB

    @pytest.mark.gpu
    def test_the_cuda_allocator_gives_the_same_peak(self):
        with measured_peak(torch.device("cuda:0")) as measured:
            first = torch.ones(1 << 20, device="cuda:0")
            del first
        assert measured.peak_bytes == 4 << 20
