"""A study resumes, writes tables and figures, and is read from plain and compressed records."""

import gzip
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest

from experiments.config import Config
from experiments.study.console import ExperimentError
from experiments.study.harness import DeltaNLLRecord, Job, Study, delta_nll_fields
from experiments.study.table_format import TitledTable, columns_table


@dataclass(frozen=True)
class CacheRow(DeltaNLLRecord):
    level: str

    file = "caches.jsonl"
    identity = ("level",)


class FakeStudy:
    """A study of caches whose rows are counted as they are made."""

    def __init__(self, levels):
        self.levels, self.made = levels, Counter()
        self.study = Study("caches", "Caches", [CacheRow], self.jobs, self.tables)

    def jobs(self, config, folder):
        for level in self.levels:
            make = partial(self.row, level)
            depends_on = {"seed": config.seed}
            yield Job(CacheRow, (level,), depends_on, make)

    def row(self, level):
        self.made[level] += 1
        losses = delta_nll_fields([len(level), len(level)])
        return CacheRow(level, **losses)

    def tables(self, rows):
        columns = {"Caches": lambda row: row.level, "ΔNLL": lambda row: str(row.estimate)}
        return [TitledTable(columns_table(rows, columns), "Caches", "What it means.")]


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
    assert rows[0].provenance.keys() == {"depends_on", "git"}
    assert rows[0].key == next(iter(second.jobs(config, folder))).key
    second.study.run(config, folder)
    assert second.made.total() == 2, "nothing is measured again"
    text = second.study.markdown(rows)
    assert text == (folder / "tables.md").read_text()
    assert text.startswith("# Caches\n\n## Caches\n\nWhat it means.\n\n| Cach")
    assert "| int16 | 5.000 [5.000, 5.000] |" in text
    other = FakeStudy(["int8"])
    other.study.run(Config(stage="levels", progress=False, seed=1), folder)
    assert other.made == Counter(["int8"])


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
