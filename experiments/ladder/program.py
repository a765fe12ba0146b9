"""``python -m experiments.ladder``: loss against bytes, by precision, by removal, and by both."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.comparison.records import RowFile, delta_nll_fields, row_key
from experiments.comparison.run_folder import RunFolder, git_state
from experiments.config import Config
from experiments.console import say
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.plans import Candidate, candidates
from experiments.ladder.records import LADDER_FILE, LadderRow, request_field
from experiments.ladder.summaries import Ladder, LadderRecords
from experiments.ladder.tables import publish
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.llm.progress import progress_bar
from rap_env.scoring.scorer import MaskScorer

FROZEN = ("model", "evaluate.text")


def ladder(config: Config, folder: Path) -> Path:
    """Measure the loss and count the bytes of all plans; existing rows are not measured again.

    Returns:
        The path of ``ladder.jsonl``.
    """
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=FROZEN)
    context = build_context(config)
    report = held_out_scorer(config.ladder.text_of(config.evaluate.text), "report", context)
    file = RowFile(folder / LADDER_FILE, LadderRow)
    depends_on, git = report_identity(context, report), git_state()
    rows = []
    found = list(candidates(config.ladder, context))
    for candidate in progress_bar(config.progress, found, desc="ladder", unit="plan"):
        shape = candidate.request.batch_size, candidate.request.seq_len_tokens
        provenance = {"depends_on": {**depends_on, "plan": candidate.plan.levels}, "git": git}
        key = row_key(candidate.method, candidate.name, shape, provenance)
        rows.append(file.get(key, partial(_row, candidate, context, report, provenance)))
    run.finish(started, rows=len(rows), native_nll=report.dense_nll)
    publish(folder, LadderRecords(Ladder(rows)))
    say(f"{len(rows)} records in {folder / LADDER_FILE}.")
    return folder / LADDER_FILE


def report_identity(context: PruningContext, report: MaskScorer) -> dict[str, Any]:
    """What a row depends on: the model and the text."""
    facts = context.memory.facts
    return {
        "model_fingerprint": facts.fingerprint,
        "dtype": facts.dtype,
        "weights": facts.weights,
        "report_text": report.corpus.provenance,
        "report_sha256": report.corpus.sha256,
    }


def delta_nll(report: MaskScorer, candidate: Candidate) -> npt.NDArray[np.float64]:
    """ΔNLL of a plan over the model as loaded, on each window, (windows,)."""
    delta: npt.NDArray[np.float64] = report.window_nll(candidate.plan) - report.window_nll(
        BlockMask()
    )
    return delta


def _row(
    candidate: Candidate, context: PruningContext, report: MaskScorer, provenance: dict[str, Any]
) -> LadderRow:
    request = candidate.request
    held = context.memory.breakdown(candidate.plan, request)
    set_budget = candidate.budget_fraction is not None
    return LadderRow(
        method=candidate.method,
        name=candidate.name,
        request=request_field((request.batch_size, request.seq_len_tokens)),
        budget_fraction=candidate.budget_fraction,
        budget_bytes=request.budget_bytes if set_budget else None,
        held_bytes=held.peak - held.workspace,
        peak_bytes=held.peak,
        fits=not set_budget or held.peak <= request.budget_bytes,
        breakdown=held.as_dict(),
        levels=candidate.plan.levels,
        **delta_nll_fields(delta_nll(report, candidate)),
        provenance=provenance,
    )
