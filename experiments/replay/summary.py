"""From what a system did to its row, and to the files beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.records import write_records
from experiments.comparison.statistics import bootstrap_mean
from experiments.replay.budgets import Budget
from experiments.replay.handled import Handled, Served
from experiments.replay.load import Asked
from experiments.replay.quality import Quality, QualityJudge
from experiments.replay.rows import ReplayRow
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.request import Request

STEPS, REQUESTS = "replay_steps", "replay_requests"
"""Folders beside ``replay.jsonl``, with a file of JSON lines for each system."""


@dataclass(frozen=True)
class Judged:
    """What a system did, and how good what it generated is.

    Attributes:
        served: What it did.
        qualities: Quality of each served request, by its number.
        mask_loss: Loss of the masks on held-out text, mean over generated tokens, or None.
    """

    served: Served
    qualities: dict[int, Quality]
    mask_loss: float | None


def judged(served: Served, judge: QualityJudge) -> Judged:
    """Judge all that a system generated.

    Raises:
        NonFiniteScoreError: The model gave NaN or infinity.
    """
    done = [h for h in served.handled if h.outcome == "served" and h.handle and h.handle.token_ids]
    qualities = {h.asked.number: judge.judge(h.asked, h.handle.token_ids) for h in done if h.handle}
    return Judged(served, qualities, judge.mask_loss(_tokens_by_mask(done)))


def make_row(
    found: Judged, budget: Budget, memory: MemoryModel, provenance: dict[str, Any]
) -> ReplayRow:
    """The row of a system.

    Args:
        found: What it did.
        budget: The budget.
        memory: The model's byte arithmetic.
        provenance: As in `ReplayRow`.
    """
    served, trail = found.served, found.served.trail
    done = [h for h in served.handled if h.outcome == "served"]
    counts = Counter(h.outcome for h in served.handled)
    end = trail.moments[-1].end_s if trail.moments else 0.0
    servable = sum(_fits_alone(h.asked, budget.most(0.0, end), memory) for h in served.handled)
    ttft = [h.ttft_s for h in done if h.ttft_s is not None]
    tpot = [h.tpot_s for h in done if h.tpot_s is not None]
    tokens = sum(len(h.handle.token_ids) for h in done if h.handle)
    by_mask = _tokens_by_mask(done)
    controller = served.controller
    stats = served.stats
    duration = max((h.handle.ended_s or 0.0 for h in done if h.handle), default=0.0)
    duration -= served.handled[0].asked.time_s
    return ReplayRow(
        system=served.system.name,
        requests=len(served.handled),
        served=len(done),
        served_fraction=len(done) / len(served.handled),
        servable=servable,
        served_fraction_of_servable=len(done) / servable if servable else None,
        refused=counts["refused"],
        queue_full=counts["queue_full"],
        timed_out=counts["timed_out"],
        failed=counts["failed"] + counts["unserved"],
        queued=sum(h.waited for h in served.handled),
        preemptions=stats.preemptions,
        violation_byte_s=trail.violation_byte_s,
        violations=trail.violations,
        late_byte_s=trail.late_byte_s(budget),
        peak_bytes=trail.peak_bytes,
        budget_least_bytes=budget.least(0.0, end),
        **_percentiles("ttft", ttft),
        **_percentiles("tpot", tpot),
        tokens=tokens,
        tokens_per_s=tokens / duration if duration > 0 else 0.0,
        duration_s=max(0.0, duration),
        busy_s=served.busy_s,
        controller_overhead_fraction=stats.overhead_s / stats.busy_s if stats.busy_s else 0.0,
        decisions=controller.decisions,
        decision_s=controller.decision_s,
        switches=controller.switches,
        switch_s=controller.switch_s,
        masks=len(by_mask),
        removed_mean=_mean_removed(by_mask),
        **_quality(list(found.qualities.values()), found.mask_loss, tokens),
        energy_j=served.energy_j,
        notes=served.system.notes,
        provenance=provenance,
    )


def write_details(folder: Path, found: Judged) -> None:
    """Write what figures need beside the row: steps over time, and a line for each request.

    Raises:
        StorageFullError: The disk is full.
    """
    name = f"{found.served.system.name}.jsonl"
    write_records(folder / STEPS / name, found.served.trail.thinned())
    requests = [_request(h, found.qualities.get(h.asked.number)) for h in found.served.handled]
    write_records(folder / REQUESTS / name, requests)


def _request(handled: Handled, quality: Quality | None) -> dict[str, Any]:
    asked, handle = handled.asked, handled.handle
    record = {
        "number": asked.number,
        "arrived_s": round(asked.time_s, 4),
        "prompt_tokens": len(asked.prompt_ids),
        "new_tokens": asked.new_tokens,
        "outcome": handled.outcome,
        "waited": handled.waited,
        "ttft_s": _rounded(handled.ttft_s),
        "tpot_s": _rounded(handled.tpot_s),
        "tokens": len(handle.token_ids) if handle else 0,
        "preemptions": handle.preemptions if handle else 0,
        "masks": len(set(handle.masks)) if handle else 0,
        "removed_mean": _rounded(_mean_removed(_tokens_by_mask([handled]))),
    }
    if quality is not None:
        record |= {
            "nll": _rounded(quality.nll), "loss": _rounded(quality.loss), "same": quality.same,
            "right": quality.right,
        }  # fmt: skip
    return record


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _percentiles(name: str, values: Sequence[float]) -> dict[str, Any]:
    """p50, p95 and p99 under the row's names."""
    found = np.percentile(values, [50, 95, 99]).tolist() if values else [None] * 3
    return {f"{name}_p{p}_s": value for p, value in zip((50, 95, 99), found, strict=True)}


def _quality(qualities: Sequence[Quality], mask_loss: float | None, tokens: int) -> dict[str, Any]:
    """The row's entries on quality."""
    loss = bootstrap_mean([q.loss for q in qualities]) if qualities else None
    known = [q.right for q in qualities if q.right is not None]
    return {
        "loss_mean": loss.mean if loss else None,
        "loss_ci_low": loss.low if loss else None,
        "loss_ci_high": loss.high if loss else None,
        "mask_loss_mean": mask_loss,
        "generated_nll_mean": float(np.mean([q.nll for q in qualities])) if qualities else None,
        "same_fraction": sum(q.same for q in qualities) / tokens if tokens else None,
        "accuracy": sum(known) / len(known) if known else None,
        "accuracy_n": len(known),
    }


def _tokens_by_mask(handled: Sequence[Handled]) -> dict[BlockMask, int]:
    """Tokens generated under each mask."""
    return dict(Counter(mask for h in handled if h.handle for mask in h.handle.masks))


def _mean_removed(tokens: dict[BlockMask, int]) -> float | None:
    """Removed blocks, mean over tokens."""
    if not tokens:
        return None
    return float(np.average([len(mask) for mask in tokens], weights=list(tokens.values())))


def _fits_alone(asked: Asked, most_bytes: int, memory: MemoryModel) -> bool:
    """Whether some mask serves a request alone within so many bytes."""
    return memory.least_peak_bytes(Request(1, asked.total_tokens, most_bytes)) <= most_bytes
