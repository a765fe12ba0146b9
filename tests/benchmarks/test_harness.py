from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import pytest

from benchmarks import harness
from benchmarks.harness import (
    Settings,
    Target,
    alternate,
    ratios,
    settings_from_cli,
    spread,
)
from benchmarks.record import write_record
from rap_env.errors import InvalidRequestError


@dataclass
class _Settings(Settings):
    batch_size: int = 3


def _given(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *words])


def test_settings_come_from_the_command_line(monkeypatch):
    _given(monkeypatch, "batch_size=4", "threads=1")
    assert settings_from_cli(_Settings) == _Settings(batch_size=4, threads=1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch_sise=4", "Key 'batch_sise' not in '_Settings'"),
        ("batch_size=many", "Value 'many'"),
        ("batch_size", "batch_size|None"),
        ("repeats=0", "repeats must be at least 1, not 0"),
    ],
)
def test_a_wrong_setting_gives_a_short_error(word, message, monkeypatch, capsys):
    _given(monkeypatch, word)
    with pytest.raises(SystemExit) as ended:
        settings_from_cli(_Settings)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert any(part in said for part in message.split("|"))
    assert "known are repeats, threads, results_dir, batch_size" in said


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_what_is_measured_and_lists_the_settings(word, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "What this measures.")
    _given(monkeypatch, word, "batch_size=2")
    with pytest.raises(SystemExit) as ended:
        settings_from_cli(_Settings)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith("What this measures.\n")
    assert "\nrepeats: 5\n" in said
    assert "\nbatch_size: 3\n" in said


def test_a_late_error_is_short_too(monkeypatch, capsys):
    def run(settings: _Settings) -> None:
        raise InvalidRequestError(f"No batch of {settings.batch_size}.")

    _given(monkeypatch, "batch_size=0")
    with pytest.raises(SystemExit) as ended:
        harness.launch(_Settings, run)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Error: No batch of 0.\n"


def test_sides_take_turns_after_the_warm_up():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = alternate(sides, repeats=3, warm_up=2)
    assert "".join(calls) == "ABAB" + "ABABAB"
    assert {name: len(found) for name, found in seconds.items()} == {"A": 3, "B": 3}
    assert all(found > 0 for side in seconds.values() for found in side)


def test_only_the_call_is_timed(monkeypatch):
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    assert alternate({"A": lambda: None}, repeats=2, warm_up=3) == {"A": [2.5, 0.25]}


def test_spread_and_paired_ratios():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "repeats": 3}
    # Paired: the ratio of the medians would be 4 / 2 = 2.
    assert ratios([4.0, 2.0, 9.0], [4.0, 2.0, 1.0])["median"] == 1.0
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("at_least", "at_most", "reached", "met"),
    [
        (2.0, None, 2.0, True),
        (2.0, None, 1.9, False),
        (None, 3.0, 3.0, True),
        (None, 3.0, 3.1, False),
        (2.0, 3.0, 2.5, True),
        (2.0, 3.0, 1.0, False),
    ],
)
def test_a_target_is_met_within_its_bounds(at_least, at_most, reached, met):
    assert Target("ratio", at_least, at_most, reached).met is met


def test_a_target_without_bounds_is_rejected():
    with pytest.raises(ValueError, match="'ratio' needs at_least or at_most"):
        Target("ratio", None, None, 1.0)


def test_the_median_of_a_spread_decides():
    target = Target.of("ratio", spread([1.0, 3.0, 9.0]), at_least=2.0, against="the naive loop")
    assert (target.reached, target.low, target.high, target.met) == (3.0, 1.0, 9.0, True)


def test_a_record_states_how_the_numbers_were_measured(tmp_path, capsys):
    slow = Target("seconds", None, 3.0, 4.0, low=3.5, high=5.0)
    path = write_record(
        "toy",
        device="cuda:1",
        settings=_Settings(results_dir=str(tmp_path), batch_size=7),
        targets=[Target("ratio", 2.0, None, 3.0), slow],
        measured={"side": {"step_s": spread([1.0, 2.0, 3.0]), "bytes": 123_456}},
        notes=["It was warm."],
    )
    assert path == tmp_path / "toy-cuda.json"
    record = json.loads(path.read_text())
    assert record["device"] == "cuda:1"
    assert record["settings"] == {"repeats": 5, "threads": None, "batch_size": 7}
    assert [target["met"] for target in record["targets"]] == [True, False]
    assert record["measured"]["side"]["step_s"]["median"] == 2.0
    assert record["notes"] == ["It was warm."]
    assert {"cpu", "cores", "instruction_sets", "memory_bytes"} <= record["machine"].keys()
    assert {"python", "torch", "transformers", "gymnasium", "rap_env"} <= record["versions"].keys()
    assert {"commit", "dirty", "date"} <= record.keys()
    printed = capsys.readouterr().out
    assert "MISSED seconds: 4 [3.5, 5], wanted ≤ 3" in printed
    assert "side: step_s 2 [1, 3], bytes 123,456" in printed


def test_a_non_finite_number_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_record(
            "toy",
            device="cpu",
            settings=_Settings(results_dir=str(tmp_path)),
            targets=[],
            measured={"x": float("nan")},
        )
    assert not list(tmp_path.iterdir())
