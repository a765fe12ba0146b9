"""Rows of ``replay.jsonl``: the results of one system on the workload of a replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.study.records import Record

OUTCOMES = ("served", "refused", "queue_full", "timed_out", "unserved", "failed")
"""Outcomes of a request: served to its last token; rejected because no mask can ever fit it;
rejected because the queue was full; queue timeout; still waiting at the end of the replay; ended
by an error."""


@dataclass(frozen=True)
class ReplayRow(Record):
    """One system: a line of ``replay.jsonl``. Times are seconds of the replay's clock.

    Attributes:
        system: Its name, as in ``replay.systems``.
        requests: Requests that arrived.
        served: Requests that got all their tokens.
        served_fraction: `served` as a share of `requests`.
        servable: Requests that, alone, some mask fits into the maximum of the budget.
        served_fraction_of_servable: `served` as a share of `servable`.
        refused: Requests rejected on arrival because they can never fit.
        queue_full: Requests rejected because the queue was full.
        timed_out: Requests with a queue timeout.
        failed: Requests that ended in an error or were still waiting at the end.
        queued: Requests that waited because memory was short.
        preemptions: How often a running request was returned to the queue.
        violation_byte_s: Integral of the measured bytes above the budget at the start of each
            step, in byte-seconds, idle time included.
        violations: Steps and idle intervals with measured bytes above the budget.
        late_byte_s: Byte-seconds above a budget that fell during a step, up to its end. A system
            that acts between steps cannot avoid them.
        peak_bytes: Maximum of the measured bytes.
        budget_least_bytes: Minimum of the budget while the system ran.
        ttft_p50_s: Median time to first token of served requests, from the arrival; None without
            served requests.
        ttft_p95_s: 95th percentile.
        ttft_p99_s: 99th percentile.
        tpot_p50_s: Median time per output token after the first.
        tpot_p95_s: 95th percentile.
        tpot_p99_s: 99th percentile.
        tokens: Tokens generated for served requests.
        tokens_per_s: `tokens` divided by `duration_s`.
        duration_s: Seconds from the first arrival to the last token.
        busy_s: Seconds of work, decisions and switches included.
        controller_overhead_fraction: Seconds of decisions and switches as a share of the work.
        decisions: Number of decisions.
        decision_s: Their seconds.
        switches: Changes of the mask.
        switch_s: Their seconds.
        masks: Different masks and plans under which tokens were generated.
        removed_mean: Removed blocks, mean over generated tokens.
        loss_mean: NLL of the generated tokens under the dense model minus that of the dense
            model's own greedy continuation of the same prompt and length, mean over served
            requests, nats per token.
        loss_ci_low: Lower end of its 95 % interval over requests.
        loss_ci_high: Upper end.
        mask_loss_mean: ΔNLL of the masks or plans on held-out text, mean over generated tokens,
            nats per token; None if it was not measured.
        generated_nll_mean: NLL of the generated tokens under the dense model, nats per token.
        same_fraction: Share of generated tokens equal to the dense model's own continuation.
        accuracy: Share of correct answers among served requests with a known answer.
        accuracy_n: Number of those requests.
        lowered_mean: Kept items below their native level, mean over generated tokens; None in
            records of versions without levels.
        notes: Facts about the system, such as its static mask.
        energy_j: Energy of the work, in joules; measured in no record.
    """

    system: str
    requests: int
    served: int
    served_fraction: float
    servable: int
    served_fraction_of_servable: float | None
    refused: int
    queue_full: int
    timed_out: int
    failed: int
    queued: int
    preemptions: int
    violation_byte_s: float
    violations: int
    late_byte_s: float
    peak_bytes: int
    budget_least_bytes: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    tpot_p99_s: float | None
    tokens: int
    tokens_per_s: float
    duration_s: float
    busy_s: float
    controller_overhead_fraction: float
    decisions: int
    decision_s: float
    switches: int
    switch_s: float
    masks: int
    removed_mean: float | None
    loss_mean: float | None
    loss_ci_low: float | None
    loss_ci_high: float | None
    mask_loss_mean: float | None
    generated_nll_mean: float | None
    same_fraction: float | None
    accuracy: float | None
    accuracy_n: int
    lowered_mean: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    energy_j: float | None = None

    record_name = "A replay record"
    rerun = "run the replay again"
    identity = ("system",)
