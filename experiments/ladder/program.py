"""``python -m experiments.ladder``: loss against bytes, by precision, by removal, and by both."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.console import say
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.plans import Candidate, candidates
from experiments.ladder.records import LADDER_FILE, LadderRow, request_field
from experiments.ladder.summaries import Ladder, LadderRecords
from experiments.ladder.tables import publish
from experiments.study.records import RowFile, delta_nll_fields, row_key
from experiments.study.run_folder import RunFolder, git_state
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import shared_llm
from rap_env.models.progress import progress_bar
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
    packed = packed_scorer(config, context, report)
    sides = {False: report, True: packed or report}
    git, rows = git_state(), []
    memory = None if packed is None else MemoryModel(packed.llm)
    found = list(candidates(config.ladder, context, memory))
    for candidate in progress_bar(config.progress, found, desc="ladder", unit="plan"):
        shape = candidate.request.batch_size, candidate.request.seq_len_tokens
        side = sides[candidate.packed]
        depends_on = {**report_identity(side), "plan": candidate.plan.levels}
        provenance = {"depends_on": depends_on, "git": git}
        key = row_key(candidate.method, candidate.name, shape, provenance)
        rows.append(file.get(key, partial(_row, candidate, side, report, provenance)))
    run.finish(started, rows=len(rows), native_nll=report.dense_nll)
    publish(folder, LadderRecords(Ladder(rows)))
    say(f"{len(rows)} records in {folder / LADDER_FILE}.")
    return folder / LADDER_FILE


def packed_scorer(config: Config, context: PruningContext, report: MaskScorer) -> MaskScorer | None:
    """A scorer of the model as shipped on the same text; None if its weights are not packed."""
    model = config.model
    llm = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    return MaskScorer(llm, report.corpus, context.store) if llm.facts.packed else None


def report_identity(report: MaskScorer) -> dict[str, Any]:
    """What a row depends on: the model and the text."""
    facts = report.llm.facts
    return {
        "model_fingerprint": facts.fingerprint,
        "dtype": facts.dtype,
        "weights": facts.weights,
        "report_text": report.corpus.provenance,
        "report_sha256": report.corpus.sha256,
    }


def _row(
    candidate: Candidate, side: MaskScorer, report: MaskScorer, provenance: dict[str, Any]
) -> LadderRow:
    """The row of a plan of the model of `side`; `report` scores the unquantised model."""
    request = candidate.request
    held = MemoryModel(side.llm).breakdown(candidate.plan, request)
    delta_nll = side.window_nll(candidate.plan) - report.window_nll(BlockMask())
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
        **delta_nll_fields(delta_nll),
        packed=candidate.packed,
        provenance=provenance,
    )
