import json

from benchmarks.table_steps import TableSettings, main


def test_steps_of_both_tasks_are_counted(tmp_path):
    main(TableSettings(num_envs=2, steps=3, repeats=2, results_dir=str(tmp_path)))
    record = json.loads((tmp_path / "table_steps-cpu.json").read_text())
    ladder, prune = record["targets"]
    assert "RAPLadder" in ladder["what"]
    assert "RAPPrune" in prune["what"]
    assert ladder["reached"] == record["measured"]["steps_per_cpu_s"]["ladder"]["median"] > 0
