"""``python -m experiments.compare``: compare any set of run folders, from records only.

    python -m experiments.compare runs=results
    python -m experiments.compare runs=[runs/main,runs/seeds] format=markdown

Rows of different comparisons are never averaged together. Only the tables are printed to the
standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.result_figures import draw_figures
from experiments.comparison.result_tables import tables_markdown
from experiments.comparison.run_records import (
    LEARNING_CAPTION,
    Records,
    learning_table,
    read_comparisons,
    swept_table,
)
from experiments.config.program_settings import CompareConfig
from experiments.study.console import run_with_settings
from experiments.study.table_format import markdown, rendered, text_words


def compare(config: CompareConfig) -> str:
    """Return the comparison of all methods in some folders, in the configured format."""
    comparisons = read_comparisons(config.folders)
    if config.figures is not None:
        draw_figures(comparisons, Path(config.figures))
    if config.format == "text":
        return rendered(as_markdown(comparisons, captions=True))
    return as_markdown(comparisons)


def as_markdown(comparisons: Sequence[Records], *, captions: bool = False) -> str:
    """Format all tables as Markdown: those of all evaluations, then those of training runs.

    Args:
        comparisons: The records.
        captions: Whether to add the texts of each comparison, and what numbers of tables
            mean.
    """
    parts = []
    for records in comparisons:
        if records.comparison is None:
            continue
        title = records.title(records.evaluations[0])
        parts.append(tables_markdown(records.comparison, title, captions=captions))
        if captions:
            depends = records.rows[0].depends_on
            parts.append(
                f"Report text: {text_words(depends.get('report_text', {}))}. Calibration text: "
                f"{text_words(depends.get('calibration', {}))}.\n"
            )
    for records in comparisons:
        if records.runs:
            title, table = records.title(records.runs[0]), markdown(learning_table(records.runs))
            parts.append(f"# {title}: training\n\n{table}\n{LEARNING_CAPTION}\n")
            if (swept := swept_table(records.runs)) is not None:
                parts.append(f"# {title}: what varies\n\n{markdown(swept)}")
    return "\n".join(parts).rstrip()


def main(config: CompareConfig) -> None:
    """Print the comparison to the standard output."""
    sys.stdout.write(f"{compare(config)}\n")


if __name__ == "__main__":
    run_with_settings(CompareConfig, main)
