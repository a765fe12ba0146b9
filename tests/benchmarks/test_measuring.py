import sys
from dataclasses import dataclass

import pytest

from benchmarks.measuring import (
    Settings,
    alternate,
    committed_records,
    spread,
    target,
    targets_table,
    write_record,
)
from experiments.study.console import run_with_settings
from rap_env.errors import InvalidRequestError
from tests.imports import loaded_by


@dataclass
class _Settings(Settings):
    batch_size: int = 3


def _given(monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *words])


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


def test_help_says_what_is_measured_and_lists_the_settings(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "What this measures.")
    _given(monkeypatch, "--help", "batch_size=2")
    run_with_settings(_Settings, _reject)
    said = capsys.readouterr().out
    assert said.startswith("What this measures.\n")
    assert "\nbatch_size: 3\n" in said


def test_sides_take_turns_after_the_warm_up():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = alternate(sides, repeats=3)
    assert "".join(calls) == "AB" + "ABABAB"
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}
    assert all(value > 0 for side in seconds.values() for value in side)


def test_a_record_states_how_the_numbers_were_measured_and_makes_the_rows_of_its_targets(
    tmp_path, capsys
):
    fast = target("times as fast", 2.4, 2.6, 2.5, at_least=2.2, against="naive loop")
    slow, settings = target("seconds", 4.0, at_most=3.0), _Settings(results_dir=str(tmp_path))
    write_record("toy", settings, [fast, slow], step_s=spread([3.0, 1.0, 2.0]))
    (record,) = committed_records(tmp_path)
    assert record.settings == {"repeats": 5, "threads": None, "batch_size": 3}
    assert record.measured["step_s"] == {"median": 2, "low": 1, "high": 3, "repeats": 3}
    made = record.provenance
    assert {"cpu", "cores", "instruction_sets"} <= made["machine"].keys()
    assert {"torch", "transformers", "gymnasium", "rap-env"} <= made["packages"].keys()
    assert {"python", "git"} <= made.keys()
    made["machine"] = {"cpu": "Toy", "threads": 2}
    assert targets_table([record]).splitlines()[2:] == [
        "| `toy` | times as fast | naive loop | 2.5 [2.4, 2.6] | ≥ 2.2 | yes | Toy, 2 threads |",
        "| `toy` | seconds | - | 4 | ≤ 3 | no | Toy, 2 threads |",
    ]
    assert "| `toy` | seconds | - | 4 | ≤ 3 | no |" in capsys.readouterr().out
    write_record("toy", settings, [fast], device="cuda:1")
    assert {path.name for path in tmp_path.iterdir()} == {"toy-cpu.json", "toy-cuda.json"}
    assert len(committed_records(tmp_path)) == 2


def test_a_process_whose_memory_is_measured_does_not_load_pandas():
    assert loaded_by("import benchmarks.preparing", of=("pandas", "matplotlib")) == []
