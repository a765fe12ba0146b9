"""Replay the plans of an entry on the real model and on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.errors import ExperimentError
from rap_env.leaderboard.entries import Entry
from rap_env.leaderboard.tasks import pinned_tasks
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.scoring.scorer import MaskScorer

TOLERANCE_NLL, TOLERANCE_SHARE = 0.01, 0.02
"""Nats per token, and share of ΔNLL: other processors round bfloat16 differently."""


def check_entry(
    entry: Entry,
    memory: MemoryModel,
    requests: Sequence[Request],
    scorers: Mapping[str, MaskScorer],
    *,
    every: int = 1,
    on_plan: Callable[[], object] = lambda: None,
) -> list[str]:
    """Replay the plans of an entry.

    Args:
        entry: The entry.
        memory: Byte arithmetic of the model.
        requests: The requests of its comparison.
        scorers: A scorer of the real model for each split to check.
        every: Replay each n-th request only.
        on_plan: Called after each plan.

    Returns:
        What does not reproduce, one sentence each.
    """
    wrong = []
    for run in entry.runs:
        if len(run.plans) != len(requests):
            return [f"It has {len(run.plans)} plans for {len(requests)} requests."]
        for number in range(0, len(requests), every):
            request, plan = requests[number], Plan.of(run.plans[number])
            where = f"Seed {run.seed}, request {number} ({request})"
            peak_bytes = memory.peak_bytes(plan, request)
            if (peak_bytes <= request.budget_bytes) != run.fits[number]:
                wrong.append(
                    f"{where}: the plan needs {peak_bytes:,} bytes, so fits={run.fits[number]} "
                    "is wrong."
                )
            if not run.fits[number]:
                continue
            for split, scorer in scorers.items():
                if split not in run.delta_nll:
                    continue
                stated = run.delta_nll[split][number]
                found = scorer.nll(plan) - scorer.dense_nll
                if not math.isclose(stated, found, rel_tol=TOLERANCE_SHARE, abs_tol=TOLERANCE_NLL):
                    wrong.append(f"{where}, {split}: ΔNLL {stated:.4f} stated, {found:.4f} found.")
            on_plan()
    return wrong


def check_file(
    file: Path, text: str | None, text_field: str, every: int, threads: int
) -> list[str]:
    """Replay the plans of an entry's file on the real model.

    Args:
        file: The entry.
        text: The file of the held-out text; None checks the calibration text only.
        text_field: Its field with the text.
        every: Check each n-th request only.
        threads: Threads of torch.

    Returns:
        What does not reproduce, one sentence each.

    Raises:
        ExperimentError: The comparison has no task with the real model.
        CorpusError: The text gives other tokens.
    """
    import torch

    from rap_env.models.progress import progress_bar
    from rap_env.scoring.corpus import CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import MaskScorer

    torch.set_num_threads(threads)
    entry = Entry.load(file)
    live = [
        task
        for task in pinned_tasks().values()
        if task.comparison == entry.comparison and task.live
    ]
    if not live:
        raise ExperimentError(
            f"The comparison {entry.comparison} has no task with the real model, so its entries "
            "cannot be replayed here."
        )
    (task,) = live
    # Plans are replayed, not chosen, so that no importance has to be measured.
    context = task.make(importance="none").unwrapped.context  # type: ignore[attr-defined]
    scorers = {"calibration": context.scorer}
    if text is not None:
        names = ("windows", "window_tokens", "seed", "role")
        settings = {name: task.test_text[name] for name in names}
        asked = CorpusConfig(text, field=text_field, **settings, sha256=task.test_text["sha256"])
        corpus = load_corpus(asked, context.llm)
        scorers["test"] = MaskScorer(context.llm, corpus, context.store)
    total = len(entry.runs) * len(range(0, len(task.requests), every))
    with progress_bar(True, total=total, desc="replay", unit="plan") as bar:
        return check_entry(
            entry, context.memory, task.requests, scorers, every=every, on_plan=bar.update
        )
