from __future__ import annotations

import json
import sys

import pytest

from benchmarks import packaged_table
from benchmarks.packaged_table import Play, TableSettings, main, training_s


def test_a_record_has_rates_of_both_versions_and_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_table, "EXAMPLE", tmp_path / "example.py")
    (tmp_path / "example.py").write_text("sum(range(3_000_000))")
    main(TableSettings(steps=120, sizes=[1, 3], repeats=2, results_dir=str(tmp_path)))
    record = json.loads((tmp_path / "packaged_table-cpu.json").read_text())
    goals = [(target["at_least"], target["at_most"]) for target in record["targets"]]
    assert record["settings"]["python"].startswith("python"), "no folder of this machine"
    assert goals == [(15_000.0, None), (15_000.0, None), (None, 60.0)], "3 is no published size"
    assert all(target["reached"] > 0 for target in record["targets"])
    assert {f"v{v}_{n}_steps_per_cpu_s" for v in (0, 1) for n in (1, 3)} == set(record["measured"])


@pytest.mark.parametrize("num_envs", [1, 3])
def test_only_valid_actions_are_played(num_envs):
    play = Play(packaged_table.TASKS["v1"], num_envs, 150)
    step = play._env.step

    def checked(action):
        valid = play._seen["action_mask"].reshape(num_envs, -1)
        assert valid[range(num_envs), action].all()
        return step(action)

    play._env.step = checked
    assert play() > 0


def test_a_training_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_table, "EXAMPLE", tmp_path / "absent.py")
    with pytest.raises(packaged_table.subprocess.CalledProcessError):
        training_s(sys.executable)
