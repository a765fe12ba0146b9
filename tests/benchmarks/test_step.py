import json

import pytest

from benchmarks.step import Player, StepSettings, known_context, main, players
from tests.tiny import tiny_model, tiny_tokenizer

SHORT = {
    "steps": 40, "table_steps": 3, "num_envs": 3, "vector_steps": 12, "rounds": 2, "repeats": 2,
    "workload": "grid",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> StepSettings:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(layers=8).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return StepSettings(model=str(folder), threads=1, results_dir=str(folder / "results"), **SHORT)


@pytest.fixture(scope="module")
def sides(settings) -> dict[str, Player]:
    return players(settings, known_context(settings))


def test_both_records_are_written(settings, tmp_path, capsys):
    settings = StepSettings(**{**vars(settings), "results_dir": str(tmp_path)})
    main(settings)
    (path,) = tmp_path.glob("step-cpu.json")
    record = json.loads(path.read_text())
    ratio, rate = record["targets"]
    assert (ratio["at_most"], rate["at_least"]) == (4.0, 100_000.0)
    slow, fast = (record["measured"]["step_us"][side] for side in ("single", "cart_pole"))
    assert slow["low"] / fast["high"] <= ratio["reached"] <= slow["high"] / fast["low"]
    assert rate["reached"] > 0
    assert "CartPole" in capsys.readouterr().out
    table = json.loads((tmp_path / "table_steps-cpu.json").read_text())
    ladder, prune = table["targets"]
    assert "RAPLadder" in ladder["what"]
    assert "RAPPrune" in prune["what"]
    assert ladder["reached"] == table["measured"]["steps_per_cpu_s"]["ladder"]["median"] > 0
