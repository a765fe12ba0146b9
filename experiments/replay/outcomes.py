"""Outcomes of requests, and the row of a system that is computed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.replay.budgets import Budget
from experiments.replay.quality import OutputQuality, QualityEvaluator
from experiments.replay.records import ReplayRow
from experiments.replay.systems import System
from experiments.replay.time_series import TimeSeries
from experiments.replay.workload import ReplayRequest
from experiments.study.records import write_records
from experiments.study.statistics import bootstrap_mean
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan
from rap_env.request import Request
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.metrics import EngineStats
from rap_env.runtime.request_handle import RequestHandle

STEPS, REQUESTS = "replay_steps", "replay_requests"
"""Folders next to ``replay.jsonl`` with a JSON-lines file for each system."""

_REJECTED = {"queue_timeout": "timed_out", "infeasible": "refused", "below_floor": "refused"}
"""Outcome of a request that waited, by the engine's reason to reject it."""


@dataclass
class RequestOutcome:
    """Outcome of one request.

    Attributes:
        handle: Its handle in the engine; None if it was rejected.
        outcome: One of `experiments.replay.records.OUTCOMES`.
        waited: Whether it waited because memory was short.
    """

    request: ReplayRequest
    handle: RequestHandle | None = None
    outcome: str = "unserved"
    waited: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds from the arrival; None without a token."""
        if self.handle is None or self.handle.first_token_s is None:
            return None
        return self.handle.first_token_s - self.request.time_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, in seconds; None with fewer than two tokens."""
        handle = self.handle
        if handle is None or handle.first_token_s is None or handle.ended_s is None:
            return None
        more = len(handle.token_ids) - 1
        return (handle.ended_s - handle.first_token_s) / more if more > 0 else None

    @property
    def ended(self) -> bool:
        """Whether no further token will follow."""
        refused = self.outcome in ("refused", "queue_full")
        return refused or bool(self.handle and self.handle.done)

    def update(self) -> None:
        """Set the outcome from the handle, if the handle is done."""
        handle = self.handle
        if handle is None or not handle.done:
            return
        if handle.reason in ("length", "stop"):
            self.outcome = "served"
        elif handle.rejection is not None:
            self.outcome = _REJECTED[handle.rejection]
        elif handle.reason == "error":
            self.outcome = "failed"


@dataclass(frozen=True)
class SystemRun:
    """The run of one system.

    Attributes:
        series: Steps and idle intervals over time.
        busy_s: Seconds of the engine's steps that did work.
    """

    system: System
    outcomes: tuple[RequestOutcome, ...]
    series: TimeSeries
    controller: RuntimeController
    stats: EngineStats
    busy_s: float


def evaluate_outputs(
    run: SystemRun, evaluator: QualityEvaluator
) -> tuple[dict[int, OutputQuality], float | None]:
    """Measure everything that a system generated.

    Returns:
        The quality of each served request by its number, and the ΔNLL of the plans on held-out
        text as `QualityEvaluator.mask_delta_nll`.
    """
    done = [o for o in run.outcomes if o.outcome == "served" and o.handle and o.handle.token_ids]
    qualities = {
        o.request.number: evaluator.evaluate(o.request, o.handle.token_ids)
        for o in done
        if o.handle
    }
    return qualities, evaluator.mask_delta_nll(_tokens_by_plan(done))


def make_row(
    run: SystemRun,
    qualities: Mapping[int, OutputQuality],
    mask_delta_nll: float | None,
    budget: Budget,
    memory: MemoryModel,
    provenance: dict[str, Any],
) -> ReplayRow:
    """Make the row of a system."""
    series = run.series
    done = [o for o in run.outcomes if o.outcome == "served"]
    counts = Counter(o.outcome for o in run.outcomes)
    end = series.intervals[-1].end_s if series.intervals else 0.0
    most = budget.most(0.0, end)
    alone = [Request(1, o.request.total_tokens, most) for o in run.outcomes]
    servable = sum(memory.least_peak_bytes(request) <= most for request in alone)
    ttft = [o.ttft_s for o in done if o.ttft_s is not None]
    tpot = [o.tpot_s for o in done if o.tpot_s is not None]
    tokens = sum(len(o.handle.token_ids) for o in done if o.handle)
    by_plan = _tokens_by_plan(done)
    controller = run.controller
    stats = run.stats
    duration = max((o.handle.ended_s or 0.0 for o in done if o.handle), default=0.0)
    duration -= run.outcomes[0].request.time_s
    return ReplayRow(
        system=run.system.name,
        requests=len(run.outcomes),
        served=len(done),
        served_fraction=len(done) / len(run.outcomes),
        servable=servable,
        served_fraction_of_servable=len(done) / servable if servable else None,
        refused=counts["refused"],
        queue_full=counts["queue_full"],
        timed_out=counts["timed_out"],
        failed=counts["failed"] + counts["unserved"],
        queued=sum(o.waited for o in run.outcomes),
        preemptions=stats.preemptions,
        violation_byte_s=series.violation_byte_s,
        violations=series.violations,
        late_byte_s=series.late_byte_s(budget),
        peak_bytes=series.peak_bytes,
        budget_least_bytes=budget.least(0.0, end),
        **percentile_fields("ttft", ttft),
        **percentile_fields("tpot", tpot),
        tokens=tokens,
        tokens_per_s=tokens / duration if duration > 0 else 0.0,
        duration_s=max(0.0, duration),
        busy_s=run.busy_s,
        controller_overhead_fraction=stats.overhead_s / stats.busy_s if stats.busy_s else 0.0,
        decisions=controller.chooser.decisions,
        decision_s=controller.chooser.decision_s,
        switches=controller.plans.switches,
        switch_s=controller.plans.switch_s,
        masks=len(by_plan),
        removed_mean=_mean_over_tokens(_removed, by_plan),
        lowered_mean=_mean_over_tokens(_lowered, by_plan),
        **_quality(list(qualities.values()), mask_delta_nll, tokens),
        notes=run.system.notes,
        provenance=provenance,
    )


def write_details(folder: Path, run: SystemRun, qualities: Mapping[int, OutputQuality]) -> None:
    """Write the other data of the figures: steps over time, and a record for each request."""
    name = f"{run.system.name}.jsonl"
    write_records(folder / STEPS / name, run.series.downsampled())
    requests = [_request_record(o, qualities.get(o.request.number)) for o in run.outcomes]
    write_records(folder / REQUESTS / name, requests)


def _request_record(outcome: RequestOutcome, quality: OutputQuality | None) -> dict[str, Any]:
    request, handle = outcome.request, outcome.handle
    record = {
        "number": request.number,
        "arrived_s": round(request.time_s, 4),
        "prompt_tokens": len(request.prompt_ids),
        "new_tokens": request.new_tokens,
        "outcome": outcome.outcome,
        "waited": outcome.waited,
        "ttft_s": _rounded(outcome.ttft_s),
        "tpot_s": _rounded(outcome.tpot_s),
        "tokens": len(handle.token_ids) if handle else 0,
        "preemptions": handle.preemptions if handle else 0,
        "masks": len(set(handle.plans)) if handle else 0,
        "removed_mean": _rounded(_mean_over_tokens(_removed, _tokens_by_plan([outcome]))),
    }
    if quality is not None:
        record |= {
            "nll": _rounded(quality.nll), "loss": _rounded(quality.delta_nll), "same": quality.same,
            "right": quality.right,
        }  # fmt: skip
    return record


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def percentile_fields(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a row with p50, p95 and p99 of seconds; None without values."""
    found = np.percentile(values, [50, 95, 99]).tolist() if values else [None] * 3
    return {f"{name}_p{p}_s": value for p, value in zip((50, 95, 99), found, strict=True)}


def loss_fields(qualities: Sequence[OutputQuality]) -> dict[str, Any]:
    """Return the fields of a row with the mean ΔNLL of answers and its interval over requests."""
    delta = bootstrap_mean([q.delta_nll for q in qualities]) if qualities else None
    return {
        "loss_mean": delta.mean if delta else None,
        "loss_ci_low": delta.low if delta else None,
        "loss_ci_high": delta.high if delta else None,
    }


def _quality(
    qualities: Sequence[OutputQuality], mask_delta_nll: float | None, tokens: int
) -> dict[str, Any]:
    """Return the entries of the row on quality."""
    known = [q.right for q in qualities if q.right is not None]
    return {
        **loss_fields(qualities),
        "mask_loss_mean": mask_delta_nll,
        "generated_nll_mean": float(np.mean([q.nll for q in qualities])) if qualities else None,
        "same_fraction": sum(q.same for q in qualities) / tokens if tokens else None,
        "accuracy": sum(known) / len(known) if known else None,
        "accuracy_n": len(known),
    }


def _tokens_by_plan(outcomes: Sequence[RequestOutcome]) -> dict[CompressionPlan, int]:
    """Count the tokens generated under each plan."""
    return dict(Counter(plan for o in outcomes if o.handle for plan in o.handle.plans))


def _mean_over_tokens(
    count: Callable[[CompressionPlan], int], tokens: dict[CompressionPlan, int]
) -> float | None:
    """Mean over tokens of a number that their plans have."""
    if not tokens:
        return None
    return float(np.average([count(plan) for plan in tokens], weights=list(tokens.values())))


def _removed(plan: CompressionPlan) -> int:
    return len(plan.removed)


def _lowered(plan: CompressionPlan) -> int:
    return len(plan.levels) - len(plan.removed)
