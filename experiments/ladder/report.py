"""The section on the ladder of a report: the Pareto figure and its tables."""

from __future__ import annotations

from functools import partial

from experiments.ladder.figures import loss_against_bytes
from experiments.ladder.summaries import LadderRecords
from experiments.ladder.tables import ladder_document
from experiments.study.page import Gallery, Section
from experiments.study.tables import TIMES, percent, shape_words

LADDER_ABSTRACT = [
    "A model can be fitted into a memory budget by storing its weights and its KV cache in fewer "
    "bits, by keeping fewer tokens in the cache, and by removing blocks. This report shows what "
    "each byte saved costs in quality, by uniform settings, by removal alone, and by a choice of "
    "a level for each item.",
]


def ladder_section(found: LadderRecords, gallery: Gallery) -> Section:
    """Section on the ladder: loss against bytes, and its tables."""
    section = Section("ladder", "Precision before removal")
    if found.ladder:
        llama = (
            "Orange: llama.cpp on the same file and windows, by the format of its cache. "
            if found.llama_cpp
            else ""
        )
        gallery.add(
            section, "loss_against_bytes", "What each byte saved costs",
            f"A panel for each request (batch {TIMES} tokens). Grey squares are uniform settings "
            "(weights / caches; those that no other setting dominates are named). The red line "
            "removes blocks and nothing else, the teal one chooses a level for each item. "
            f"{llama}ΔNLL is over the unquantised model; its axis is linear up to 0.01.",
            partial(loss_against_bytes, found.ladder, found.llama_cpp),
        )  # fmt: skip
    section.document(ladder_document(found), {})
    return section


def ladder_findings(found: LadderRecords) -> list[str]:
    """The ladder's result in a sentence: removal and levels at the same budget."""
    if not found.ladder:
        return []
    for shape in reversed(found.ladder.shapes):
        for fraction in reversed(found.ladder.fractions()):
            removal, levels = (
                found.ladder.policy_row(name, shape, fraction) for name in ("removal", "knapsack")
            )
            if removal and levels and levels.fits:
                return [
                    f"At {percent(fraction, 0)} of the unquantised peak of {shape_words(shape)} "
                    f"tokens, lowering precision first costs {levels.loss:.3f} nats per token; "
                    f"removing blocks alone costs {removal.loss:.2f}"
                    f"{'' if removal.fits else ' and does not fit'}."
                ]
    return []
