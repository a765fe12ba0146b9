"""A study resumes, writes tables and figures, and is read from plain and compressed records."""

import gzip
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import pytest

from experiments.config import Config
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Published, Study, untitled
from experiments.study.json_records import (
    DeltaNLLRecord,
    RequestRecord,
    delta_nll_fields,
    request_field,
)
from experiments.study.table_format import TitledTable, columns_table


@dataclass(frozen=True)
class CacheRow(RequestRecord, DeltaNLLRecord):
    level: str

    file = "caches.jsonl"
    identity = ("level", "shape")


class FakeStudy:
    """A study of caches whose rows are counted as they are made."""

    def __init__(self, levels):
        self.levels, self.made = levels, Counter()
        self.study = Study(
            "caches", "Caches", [CacheRow], self.jobs, self.tables, words=self.words,
        )  # fmt: skip

    def jobs(self, config, folder):
        for level in self.levels:
            make = partial(self.row, level)
            depends_on = {"seed": config.seed}
            yield Job(CacheRow, (level, (8, 64)), depends_on, make, {"by": "test"})

    def row(self, level):
        self.made[level] += 1
        losses = delta_nll_fields([len(level), len(level)])
        return CacheRow(level, request=request_field((8, 64)), **losses)

    def tables(self, rows):
        columns = {"Caches": lambda row: row.level, "ΔNLL": lambda row: str(row.estimate)}
        return [TitledTable(columns_table(rows, columns), "Caches", "What it means.")]

    def words(self, rows):
        return f"There are {len(rows)} levels."


def test_a_study_measures_each_row_once_and_reads_what_it_wrote(tmp_path):
    first, folder = FakeStudy(["int8"]), tmp_path / "run"
    config = Config(stage="levels", progress=False)
    first.study.run(config, folder)
    second = FakeStudy(["int8", "int4", "int16"])
    (folder / "caches.jsonl").open("a").write('{"level": "int4", "req')  # a kill while it wrote
    second.study.run(config, folder)
    assert second.made == Counter(["int4", "int16"])
    rows = second.study.read(folder)
    assert [row.level for row in rows] == ["int8", "int4", "int16"]
    assert {row.shape for row in rows} == {(8, 64)}
    assert rows[0].provenance.keys() == {"depends_on", "git", "by"}
    assert rows[0].key == next(iter(second.jobs(config, folder))).key
    second.study.run(config, folder)
    assert second.made.total() == 2, "nothing is measured again"
    text = second.study.markdown(rows)
    assert text == (folder / "tables.md").read_text()
    assert text.startswith(
        "# Caches\n\nThere are 3 levels.\n\n## Caches\n\nWhat it means.\n\n| Cach"
    )
    assert "| int16 | 5.000 [5.000, 5.000] |" in text
    other = FakeStudy(["int8"])
    other.study.run(Config(stage="levels", progress=False, seed=1), folder)
    assert other.made == Counter(["int8"])


def test_a_run_in_the_folder_of_committed_records_writes_their_page(tmp_path, monkeypatch):
    page, records = tmp_path / "docs" / "results" / "page.md", tmp_path / "results"
    page.parent.mkdir(parents=True)
    other = "<!-- other: begin -->\nKept.\n<!-- other: end -->\n"
    marks = "# Page\n\n<!-- caches: begin -->\n{}<!-- caches: end -->\n" + other
    page.write_text(marks.format("Old."))
    (tmp_path / "README.md").write_text("# No markers\n")
    monkeypatch.setattr("experiments.study.harness.ROOT", tmp_path)
    monkeypatch.setattr("experiments.study.harness.RESULTS", records)
    fake, config = FakeStudy(["int8"]), Config(stage="levels", progress=False)
    study = replace(fake.study, published=[Published("caches", "own/caches", untitled)])
    study.run(config, tmp_path / "elsewhere")
    assert "Old." in page.read_text()
    study.run(config, records / "own" / "caches")
    shown = untitled(study.markdown(study.read(records / "own" / "caches")))
    shown = shown.replace(", 4", ",\u00a04").strip()
    assert page.read_text() == marks.format(f"\n{shown}\n\n")


def test_compressed_records_are_read_in_the_place_of_plain_ones(tmp_path):
    fake = FakeStudy(["int8", "int4"])
    fake.study.run(Config(stage="levels", progress=False), tmp_path)
    rows = fake.study.read(tmp_path)
    plain = tmp_path / "caches.jsonl"
    plain.with_name("caches.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert fake.study.read(tmp_path) == rows


def test_frozen_settings_are_checked(tmp_path):
    fake = FakeStudy(["int8"])
    fake.study.run(Config(stage="levels", progress=False), tmp_path)
    config = Config(stage="levels", progress=False)
    config.model.name = "another"
    with pytest.raises(ExperimentError, match=r"model\.name"):
        fake.study.run(config, tmp_path)
