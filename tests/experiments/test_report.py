"""The report agrees with the records and is one self-contained file."""

import re
from html.parser import HTMLParser

import pytest

from experiments.comparison.run_records import gather
from experiments.comparison.summaries import Comparison
from experiments.config import Config
from experiments.report import findings, report
from experiments.study.console import ExperimentError
from rap_env.errors import ArtifactError
from tests.experiments.synthetic_records import FACTORS, make_rows


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


def test_a_mean_is_over_cells_that_all_methods_have():
    rows = make_rows()
    rows = [r for r in rows if not (r.method == "gsi" and r.budget_fraction == 0.7)]
    compared = Comparison(rows)
    assert compared.incomplete
    assert {cell[2] for cell in compared.cells} == {0.9, 0.8}
    whole = next(s for s in Comparison(make_rows()).summaries if s.method == "knapsack")
    part = next(s for s in compared.summaries if s.method == "knapsack")
    assert part.delta_nll.mean < whole.delta_nll.mean, "the tightest budget is left out for all"


def test_without_rows_there_is_no_comparison():
    with pytest.raises(ArtifactError, match=r"run `python -m experiments\.evaluate`"):
        Comparison([])


def test_the_findings_agree_with_the_numbers(root):
    text = " ".join(findings(gather(root)))
    assert re.search(r"loses more than .*Greedy per byte", text)
    assert re.search(r"loses less than .*Random", text)
    assert "Attention only cannot meet every budget" in text
    assert "single seed" not in text, "there are two"


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


def test_an_empty_folder_raises_an_error_with_the_command(tmp_path):
    config = Config(stage="report", name="nothing", runs_dir=str(tmp_path))
    with pytest.raises(ExperimentError, match="no records to report; run profile, train"):
        report(config, tmp_path / "nothing" / "report")
