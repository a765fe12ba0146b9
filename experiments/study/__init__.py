"""The harness of all studies: rows, resume, provenance, tables and intervals.

A study is one file with three things: a row type, a function that yields what to measure, and
the tables made from the rows. The rest is done here::

    from experiments.study.harness import Job, Published, Study
    from experiments.study.json_records import DeltaNLLRecord, RequestRecord, delta_nll_fields
    from experiments.study.table_format import TitledTable, columns_table

    @dataclass(frozen=True)
    class CacheRow(RequestRecord, DeltaNLLRecord):  # base classes have the usual fields
        caches: str

        file = "caches.jsonl"
        identity = ("caches", "shape")          # tells the rows apart

    def jobs(config: Config, folder: Path) -> Iterator[Job[CacheRow]]:
        context = build_context(config)
        for level in config.caches.levels:
            identity, depends_on = (level, (8, 2048)), {"model": context.llm.fingerprint}
            yield Job(CacheRow, identity, depends_on, partial(measure, context, level))

    def measure(context, level) -> CacheRow: ...

    def tables(rows: list[CacheRow]) -> list[TitledTable]:
        columns = {"Caches": lambda row: row.caches, "ΔNLL": lambda row: str(row.estimate)}
        return [TitledTable(columns_table(rows, columns), "Caches", "What the numbers mean.")]

    STUDY = Study("caches", "Levels of caches", [CacheRow], jobs, tables,
                  published=[Published("caches", "caches")])

    if __name__ == "__main__":
        launch(STUDY.name, STUDY.run)           # python -m experiments.studies.caches

`Study.run` appends each row to ``caches.jsonl`` as soon as it is measured, so that the same
command continues after a kill; writes ``config.yaml`` and ``run.json`` (commit, versions,
machine, seeds), ``tables.md``; and prints the tables.

`Study.published` names committed records: here ``results/caches/caches.jsonl`` (or
``.jsonl.gz``). Their tables stand in the page of the documentation that has the markers
``<!-- caches: begin -->`` and ``<!-- caches: end -->``. ``python docs/generate.py`` writes
them there for every study of the package `experiments.studies`, and so does a run in that
folder (``hydra.run.dir=results/caches``).

Where a study has rows of several types, `jobs` yields jobs of each type. Plans that a job
lists with its `scorer` are scored together.

- `json_records`: base classes of rows, and JSON lines
- `run_folder`: settings and provenance of a run
- `table_format`: a table from lines and columns, as text, Markdown or HTML; formats of
  numbers
- `logits`: logits of a text under a plan or in llama.cpp, and what differs from the model as it is
- `plotting`: label and colour of each method; style, panels, series with intervals
- `statistics`: means, differences and ratios with intervals
"""
