"""Comparison of run folders: separate groups, and pure output."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from experiments.compare import compare
from experiments.comparison.run_records import read_comparisons
from experiments.config.program_settings import CompareConfig
from experiments.study.console import ExperimentError
from experiments.study.json_records import append_record
from rap_env.errors import ArtifactError, UnknownNameError
from tests.experiments.synthetic_records import DEPENDS, make_row
from tests.programs import run_python

ROOT = Path(__file__).parents[2]


def write_rows(folder, rows, model="some-model"):
    for row in rows:
        append_record(folder / "evaluate" / "results.jsonl", asdict(row), durable=False)
    settings = {"model": {"name": model}}
    (folder / "evaluate" / "config.yaml").write_text(yaml.safe_dump(settings))


def named(*folders):
    return {records.name: records for records in read_comparisons(list(folders))}


def mean_losses(records):
    return {s.method: s.delta_nll.mean for s in records.comparison.summaries}


@pytest.fixture
def pair(tmp_path):
    """Two methods at one cell, in two comparisons of different models."""
    for name, level in (("one", 1.0), ("two", 3.0)):
        rows = [
            make_row(m, (1, 128), 0.9, window_delta_nll=[level * factor] * 16)
            for m, factor in (("gsi", 1.0), ("greedy_per_byte", 0.5))
        ]
        write_rows(tmp_path / "some" / name, rows, f"/at/model-{name}")
    return tmp_path / "some"


def test_losses_are_those_of_the_report_text(pair):
    by_name = named(pair)
    assert {name: mean_losses(records) for name, records in by_name.items()} == {
        "one": {"greedy_per_byte": 0.5, "gsi": 1.0}, "two": {"greedy_per_byte": 1.5, "gsi": 3.0}
    }  # fmt: skip
    assert [records.title(records.evaluations[0]) for records in by_name.values()] == [
        "one: model-one",
        "two: model-two",
    ]


@pytest.mark.parametrize(
    "change", ["model_fingerprint", "report_sha256", "calibration_sha256", "dtype"]
)
def test_rows_that_cannot_be_averaged_are_named(tmp_path, change):
    other = {"depends_on": {**DEPENDS, change: "0" * 64, "method": {}}}
    rows = [make_row("gsi", (1, 128), 0.9), make_row("random", (1, 128), 0.9, provenance=other)]
    write_rows(tmp_path / "mixed", rows)
    with pytest.raises(ArtifactError, match=f"differ in {change}"):
        compare(CompareConfig(runs=str(tmp_path)))


@pytest.mark.parametrize("methods", [["rap"], ["rap", "gsi"]])
def test_differences_need_a_second_method(tmp_path, methods):
    write_rows(tmp_path / "x", [make_row(m, (1, 128), 0.9) for m in methods])
    assert ("minus each other method" in compare(CompareConfig(runs=str(tmp_path)))) is (
        len(methods) > 1
    )


def test_folders_are_found_at_any_depth_and_each_file_is_read_once(pair):
    assert named(pair, pair / "one").keys() == named(pair).keys() == {"one", "two"}
    assert len(named(pair / "one")["one"].rows) == 2
    assert named(pair.parent).keys() == {"some/one", "some/two"}


def test_the_same_row_in_two_folders_of_a_comparison_counts_once(tmp_path):
    row = make_row("gsi", (1, 128), 0.9)
    for label in ("a", "b"):
        append_record(tmp_path / "x/evaluate" / label / "results.jsonl", asdict(row))
    (summary,) = named(tmp_path)["x"].comparison.summaries
    assert summary.rows == 1
    assert summary.delta_nll.mean == pytest.approx(row.delta_nll)
    other = make_row("gsi", (1, 128), 0.9, levels={"layer00.attn": "removed"})
    append_record(tmp_path / "x/evaluate/c/results.jsonl", asdict(other))
    with pytest.raises(ArtifactError, match="gsi .* have different plans"):
        compare(CompareConfig(runs=str(tmp_path)))


def test_the_final_delta_nll_is_that_of_the_last_episodes(root):
    (records,) = read_comparisons([root])
    assert [run.method for run in records.runs] == ["maskable_ppo"] * 2
    run = records.runs[0]
    steps, losses = run.series("episode/delta_nll")
    assert run.final_delta_nll == pytest.approx(sum(losses[-50:]) / 50)
    assert run.final_delta_nll < sum(losses) / len(losses)
    assert len(steps) > 50


def test_errors_name_the_wrong_value(tmp_path):
    with pytest.raises(ExperimentError, match=r"no folder .*nothing; runs= names folders"):
        compare(CompareConfig(runs=str(tmp_path / "nothing")))
    with pytest.raises(ExperimentError, match="no records under"):
        compare(CompareConfig(runs=str(tmp_path)))
    with pytest.raises(UnknownNameError, match="Did you mean 'markdown'"):
        CompareConfig(format="markdwn")
    with pytest.raises(ExperimentError, match="a folder or a list of folders"):
        CompareConfig(runs=[])


def test_a_figure_is_drawn_for_a_comparison_with_several_budgets(root, tmp_path):
    compare(CompareConfig(runs=str(root), figures=str(tmp_path)))
    (path,) = tmp_path.iterdir()
    assert path.name == f"{root.name}-delta_nll_against_budget.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def run_compare(*arguments, cwd):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return run_python(
        "-m", "experiments.compare", *arguments, cwd=cwd, timeout=120, env=environment
    )


def test_the_program_prints_published_records_and_nothing_else(tmp_path):
    done = run_compare(f"runs={ROOT}/results/learning", "format=markdown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# learning: ")
    assert "| RAP policy (5) |" in done.stdout
    assert list(tmp_path.iterdir()) == [], "it makes no run folder"
