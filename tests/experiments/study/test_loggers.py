"""Metrics reach every place that was asked for, without an account or a network."""

import sys
import time
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.config.common import ModelConfig
from experiments.config.program_settings import AgentConfig
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_records
from experiments.study.loggers import logged_settings, open_loggers
from rap_env.errors import MissingDependencyError


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


@pytest.fixture
def config(tmp_path):
    return Config(
        stage="train", name="cmp", runs_dir=str(tmp_path / "runs"), agent=AgentConfig(name="ppo"),
        model=ModelConfig(name="tiny"), seed=4,
    )  # fmt: skip


def fill(loggers, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for step in (10, 20):
        loggers.log({"episode/delta_nll": 1.0 / step, "bad": float("nan")}, step)


def test_json_lines_are_always_written(config):
    folder = config.stage_dir("train") / "ppo-s4"
    with open_loggers(config, folder, job="train") as loggers:
        assert loggers.run is None
        fill(loggers, folder.parent)
    assert read_records(folder / "metrics.jsonl") == [
        {"step": 10, "episode/delta_nll": 0.1, "bad": None},
        {"step": 20, "episode/delta_nll": 0.05, "bad": None},
    ]


def test_the_settings_of_trainings_and_evaluations_are_logged(config):
    logged = logged_settings(config)
    assert not {"cgroup", "equal_process", "logger"} & {key.split(".")[0] for key in logged}
    assert {"model.name", "calibration.windows", "seed", "evaluate.budgets"} <= set(logged)
    assert {"agent.total_timesteps", "evaluate.baselines"} <= set(logged)


def whole(run: Path) -> list[dict]:
    """All records of a run; wandb's service may still be writing them for a moment."""
    for _ in range(100):
        records = inspect(run)
        if any("exit" in record for record in records):
            break
        time.sleep(0.1)
    return records


def inspect(run: Path) -> list[dict]:
    """Whole records of an offline run, read with wandb's own schema (there is no public reader)."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = (next(run.glob("*.wandb"))).read_bytes(), 7, [], []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + size > len(data):
            break  # not yet written to its end
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(b"".join(parts))
            records.append(MessageToDict(record, preserving_proto_field_name=True))
            parts = []
    return records


def test_a_resumed_run_keeps_its_id_and_continues(config, no_login):
    """Without an account or a network: two offline parts of one run."""
    config.logger.wandb = True
    folder = config.stage_dir("train") / "ppo-s4"
    for step in (0, 20):
        with open_loggers(config, folder, job="train") as loggers:
            loggers.log({"a": 0.5, "bad": float("nan")}, step + 10)
            loggers.log({"a": 0.25}, step + 15)
        time.sleep(1)  # wandb names the folder of an offline run by the second
    parts = sorted((config.root / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({path.name.split("-")[3] for path in parts}) == 1
    for part, first in zip(parts, (10, 30), strict=True):
        history = [
            {item.get("key") or item["nested_key"][0]: item["value_json"]
             for item in record["history"]["item"]}
            for record in whole(part) if "history" in record
        ]  # fmt: skip
        assert [row["step"] for row in history] == [str(first), str(first + 5)]
        assert (history[0]["a"], history[0]["bad"]) == ("0.5", "NaN")


@pytest.mark.parametrize(
    ("asked", "mode"), [("", "offline"), ("disabled", "disabled"), ("online", "online")]
)
def test_the_mode_is_offline_without_a_login(config, no_login, monkeypatch, asked, mode):
    import wandb

    def refused(**options):
        raise wandb.errors.CommError(f"asked in mode {options['mode']}")

    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.setattr(wandb, "init", refused)
    config.logger.wandb = True
    with (
        pytest.raises(ExperimentError, match=f"asked in mode {mode}.*WANDB_MODE=offline"),
        open_loggers(config, config.stage_dir("train") / "ppo-s4", job="train"),
    ):
        pass


def test_a_login_that_the_server_does_not_confirm_is_one_sentence(config, no_login, monkeypatch):
    import wandb

    def refuse(*, prompt):
        raise wandb.errors.AuthenticationError("Failed to authenticate")

    monkeypatch.setattr(wandb, "login", refuse)
    config.logger.wandb = True
    with (
        pytest.raises(ExperimentError, match=r"Failed to authenticate.*WANDB_MODE=offline"),
        open_loggers(config, config.stage_dir("train") / "ppo-s4", job="train"),
    ):
        pass


def test_a_missing_package_is_named(config, monkeypatch, no_login):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.logger.wandb = True
    expected = r"logger=wandb needs the package 'wandb'; .*`pip install --group agents`"
    with (
        pytest.raises(MissingDependencyError, match=expected),
        open_loggers(config, config.stage_dir("train") / "ppo-s4", job="train"),
    ):
        pass
