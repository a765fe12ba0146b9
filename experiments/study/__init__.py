"""The harness of all records: rows, resume, provenance, tables and intervals.

A study is one file with three things: a row type, a function that yields what to measure, and
the tables made from the rows. The rest is done here::

    from experiments.study.harness import DeltaNLLRecord, Job, Study, delta_nll_fields
    from experiments.study.table_format import TitledTable, columns_table

    @dataclass(frozen=True)
    class CacheRow(DeltaNLLRecord):             # its base class has the usual fields
        caches: str

        file = "caches.jsonl"
        identity = ("caches",)                  # tells the rows apart

    def jobs(config: Config, folder: Path) -> Iterator[Job[CacheRow]]:
        context = build_context(config)
        for level in config.caches.levels:
            depends_on = {"model": context.llm.fingerprint}
            yield Job(CacheRow, (level,), depends_on, partial(measure, context, level))

    def measure(context, level) -> CacheRow: ...

    def tables(rows: list[CacheRow]) -> list[TitledTable]:
        columns = {"Caches": lambda row: row.caches, "ΔNLL": lambda row: str(row.estimate)}
        return [TitledTable(columns_table(rows, columns), "Caches", "What the numbers mean.")]

    STUDY = Study("caches", "Levels of caches", [CacheRow], jobs, tables)

    if __name__ == "__main__":
        launch(STUDY.name, STUDY.run)           # python -m experiments.studies.caches

`Study.run` appends each row to ``caches.jsonl`` as soon as it is measured, so that the same
command continues after a kill; writes ``config.yaml`` and ``run.json`` (commit, versions,
machine, seeds), ``tables.md``; and prints the tables. Records that are committed, as
``caches.jsonl`` or ``caches.jsonl.gz`` in ``results/caches``, are listed in
`docs/tables.py`; `docs/generate.py` writes their tables into the page with the markers
``<!-- caches: begin -->`` and ``<!-- caches: end -->``.

Where a study has rows of several types, `jobs` yields jobs of each type. The record of a
benchmark is one row in a file of its own (`benchmarks.measuring.BenchmarkRecord`).

- `harness`: base classes of rows, and what measures each once
- `json_records`: files of JSON lines
- `run_folder`: settings and provenance of a run
- `table_format`: a table from lines and columns, as text or Markdown; formats of
  numbers
- `logits`: logits of a text under a plan or in llama.cpp, and what differs from the model as it is
- `plotting`: label and colour of each method; style, panels, series with intervals
- `statistics`: means, differences and ratios with intervals
"""
