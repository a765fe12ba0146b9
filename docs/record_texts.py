"""The committed records that several pages show, and the text of their tables."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"

REPLAYS = {"replay": RESULTS / "replay" / "replay", "replay_ladder": RESULTS / "ladder" / "replay"}
"""Folders of the replays, by the name under which the pages include them."""

LONG_CONTEXTS = {
    "long_context": RESULTS / "long_context",
    "tight_recall": RESULTS / "tight_recall" / "long_context",
}
"""Folders of records over the length of the context, by the name of their page."""


def comparison_markdown(name: str) -> str:
    """All tables of one comparison, as ``python -m experiments.compare`` prints them."""
    from experiments.compare import compare
    from experiments.config.evaluation import CompareConfig

    return compare(CompareConfig(runs=str(RESULTS / name), format="markdown"))


def replay_markdown(name: str) -> str:
    """The tables of a replay, below the page's second level."""
    from experiments.replay.study import STUDY

    text = STUDY.markdown(STUDY.read(REPLAYS[name]))
    return text.partition("\n")[2].replace("\n## ", "\n### ")


def repair_markdown() -> str:
    """All tables of the repair experiment."""
    from experiments.repair.rows import read_repair
    from experiments.repair.tables import repair_markdown as tables

    return tables(read_repair(RESULTS / "repair" / "repair"))


def write(path: Path, text: str) -> None:
    """Write a file only if its text changed, so that Sphinx rebuilds no more than it must."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
