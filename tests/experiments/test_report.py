"""The report agrees with the records and is one self-contained file."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from experiments.comparison.result_figures import delta_nll_against_budget
from experiments.comparison.result_tables import (
    accuracy_table,
    delta_nll_table,
    quality_table,
    summary_table,
    tables_markdown,
    terminal_text,
)
from experiments.comparison.run_records import gather
from experiments.comparison.summaries import Comparison
from experiments.config import Config
from experiments.report import findings, report
from experiments.study.console import ExperimentError
from experiments.study.plotting import look
from rap_env.errors import ArtifactError
from tests.experiments.synthetic_records import FACTORS, make_row, make_rows


@pytest.fixture(scope="module")
def page(root):
    config = Config(stage="report", name=root.name, runs_dir=str(root.parent))
    return report(config, root / "report")


@pytest.fixture(scope="module")
def comparison():
    return Comparison(make_rows())


def test_methods_are_sorted_by_loss_with_unmet_budgets_last(comparison):
    order = [summary.method for summary in comparison.summaries]
    fair = [method for method in FACTORS if method != "attention_only"]
    assert order[:-1] == sorted(fair, key=FACTORS.__getitem__)
    assert order[-1] == "attention_only"
    assert not comparison.summaries[-1].fits_all


def test_the_terminal_table_fits_and_explains_itself(comparison):
    text = terminal_text(comparison)
    assert max(map(len, text.splitlines())) <= 100
    for method in FACTORS:
        assert look(method).label in text
    assert "Dense" not in text.split("\n\n")[0], "the reference is not compared"
    assert "nats per token" in text
    assert "miss budgets are listed last" in text.replace("\n", " ")


def test_a_mean_is_over_cells_that_all_methods_have():
    rows = make_rows()
    rows = [r for r in rows if not (r.method == "gsi" and r.budget_fraction == 0.7)]
    compared = Comparison(rows)
    assert compared.incomplete
    assert "pairs that every method has)" in terminal_text(compared).replace("\n", " ")
    assert {cell[2] for cell in compared.cells} == {0.9, 0.8}
    whole = next(s for s in Comparison(make_rows()).summaries if s.method == "knapsack")
    part = next(s for s in compared.summaries if s.method == "knapsack")
    assert part.delta_nll.mean < whole.delta_nll.mean, "the tightest budget is left out for all"


def test_tables_mark_masks_that_do_not_fit(comparison):
    _, rows = delta_nll_table(comparison, (1, 128))
    cells = {row[0]: row[1:] for row in rows}
    assert len(cells["One-shot"]) == 3
    assert "does not fit" in cells["Attention only"][2]
    assert not any("does not fit" in cell for cell in cells["One-shot"])


def test_each_method_shows_its_calibration_loss(comparison):
    header, rows = summary_table(comparison)
    held_out, searched = (header.index(f"{text} text") for text in ("ΔNLL on held-out",
                                                                    "On calibration"))  # fmt: skip
    for row in rows:
        loss = float(row[held_out].split()[0])
        assert float(row[searched]) == pytest.approx(0.9 * loss, abs=1e-3)


def test_accuracies_start_with_the_dense_model(comparison):
    header, rows = accuracy_table(comparison)
    assert header[1:3] == ["task_one", "task_two"]
    assert rows[0][0].startswith("Dense")
    assert rows[0][1:] == ["90.0 %", "70.0 %", "80.0 %"]
    assert rows[-1] == ["Guessing", "50.0 %", "25.0 %", "37.5 %"]


def test_acc_and_acc_norm_have_columns_of_their_own():
    given = {"accuracies": {"one": 0.5, "two": 0.3}, "accuracies_norm": {"one": 0.75}}
    rows = [make_row(m, (1, 128), 0.9, **given) for m in ("dense", "gsi")]
    header, lines = accuracy_table(Comparison(rows))
    assert header == ["Method", "one acc", "one acc_norm", "two acc", "mean acc"]
    assert lines[1][1:] == ["50.0 %", "75.0 %", "30.0 %", "40.0 %"]


def test_without_tasks_there_is_no_accuracy():
    rows = [make_row(m, (1, 128), 0.9, accuracies={}) for m in ("dense", "gsi", "one_shot")]
    compared = Comparison(rows)
    assert accuracy_table(compared) is None
    assert "Accuracy" not in summary_table(compared)[0]
    assert "Accuracy:" not in terminal_text(compared)
    assert "## Accuracy" not in tables_markdown(compared)


QUALITY = {
    "kl_divergence_mean": 0.0314, "kl_divergence_p99": 0.45, "same_top_token_share": 0.912,
    "flipped_answers_share": 0.084, "accuracy_above_chance": 0.871,
    "accuracy_above_chance_ci_low": 0.8, "accuracy_above_chance_ci_high": 0.94,
}  # fmt: skip


def test_distances_from_the_native_model_are_means_over_cells():
    old = [make_row(m, (1, 128), b) for m in ("dense", "gsi", "random") for b in (0.9, 0.8)]
    assert quality_table(Comparison(old)) is None
    assert "Distance" not in tables_markdown(Comparison(old))
    rows = [replace(row, **QUALITY) for row in old if row.method != "random"]
    rows[-1] = replace(rows[-1], kl_divergence_mean=0.0514)
    text_alone = dict(list(QUALITY.items())[:3])
    partly = [replace(row, **text_alone) for row in old if row.method == "random"]
    header, lines = quality_table(Comparison([*rows, *partly]))
    assert header[1:] == ["KL divergence", "99th percentile", "Same top token", "Flipped answers",
                          "Accuracy above chance kept"]  # fmt: skip
    measured = {line[0]: line[1:] for line in lines}
    assert measured["GSI order"] == ["0.041", "0.450", "91.2 %", "8.4 %", "87.1 % [80.0, 94.0]"]
    assert measured["Random"] == ["0.031", "0.450", "91.2 %", "-", "-"]
    markdown = tables_markdown(Comparison([*rows, *partly]), captions=True)
    assert "0.051 / 0.450 / 91.2 % / 8.4 % / 87.1 % [80.0, 94.0]" in markdown
    assert "Flipped answers: share of" in markdown
    mixed = Comparison([*rows[:-1], old[3], *partly])
    assert quality_table(mixed)[1][0][1:] == ["-"] * 3, "a cell is not measured"


def test_without_rows_there_is_no_comparison():
    with pytest.raises(ArtifactError, match=r"run `python -m experiments\.evaluate`"):
        Comparison([])


def test_the_findings_agree_with_the_numbers(root):
    text = " ".join(findings(gather(root)))
    assert re.search(r"loses more than .*Greedy per byte", text)
    assert re.search(r"loses less than .*Random", text)
    assert "Attention only cannot meet every budget" in text
    assert "single seed" not in text, "there are two"


def test_the_marks_of_a_single_budget_stay_close():
    """They are moved sideways by less than half a per cent of the peak, whatever the axis."""
    rows = [row for row in make_rows() if row.budget_fraction == 0.9]
    axis = delta_nll_against_budget(Comparison(rows)).axes[0]
    places = [line.lines[0].get_xdata()[0] for line in axis.containers]
    left, right = axis.get_xlim()
    assert left > right, "budgets get tighter to the right"
    assert 0 < max(places) - min(places) < 0.25 * (left - right)
    several = delta_nll_against_budget(Comparison(make_rows())).axes[0].get_xlim()
    assert several[0] > 90 > 70 > several[1]


class _Page(HTMLParser):
    """Collects what a browser would load, and the figures."""

    def __init__(self):
        super().__init__()
        self.sources, self.alts, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[k] for k in ("src", "srcset") if k in values]
        self.sources += [values["href"]] if tag == "link" else []
        self.links += [values["href"]] if tag == "a" else []
        self.alts += [values.get("alt", "")] if tag == "img" else []
        self.ids += [values["id"]] if "id" in values else []


@pytest.mark.slow
def test_the_page_has_no_external_resources(page):
    text = page.read_text()
    parser = _Page()
    parser.feed(text)
    assert len(parser.alts) >= 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parser.sources)
    assert all(len(alt) > 40 for alt in parser.alts), "a caption for each picture"
    assert {link.lstrip("#") for link in parser.links} <= set(parser.ids)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_figures_and_tables_are_written_next_to_the_page(page):
    names = {path.stem for path in (page.parent / "figures").glob("*.png")}
    expected = {"loss_against_budget", "memory", "learning_curves",
                "levels_maskable_ppo", "levels_greedy_per_byte"}  # fmt: skip
    assert names == expected
    text = (page.parent / "tables.md").read_text()
    assert "## ΔNLL (nats/token), 8 \N{MULTIPLICATION SIGN} 2,048 tokens" in text
    for line in text.splitlines():
        assert line.startswith(("|", "#")) or not line


def test_the_page_shows_provenance(page):
    text = page.read_text()
    for shown in ("An Example CPU", "c" * 40, "torch 2.13.0", "b" * 64, "Figure 5"):  # fmt: skip
        assert shown in text


def test_an_empty_folder_raises_an_error_with_the_command(tmp_path):
    config = Config(stage="report", name="nothing", runs_dir=str(tmp_path))
    with pytest.raises(ExperimentError, match="no records to report; run profile, train"):
        report(config, tmp_path / "nothing" / "report")
