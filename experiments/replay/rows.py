"""Rows of ``replay.jsonl``: what one system did with the arrivals of a replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.records import Record
from rap_env.artifacts import digest

OUTCOMES = ("served", "refused", "queue_full", "timed_out", "unserved", "failed")
"""What may become of a request: served to its last token; refused because no mask would ever fit
it; refused because the queue was full; given up after it waited too long; left over when nothing
would change any more; ended by an error."""


@dataclass(frozen=True)
class ReplayRow(Record):
    """One system: a line of ``replay.jsonl``. Times are seconds of the replay's clock.

    Attributes:
        system: Its name, as in ``replay.systems``.
        requests: Requests that arrived.
        served: Those that got all their tokens.
        served_fraction: Share of those that arrived.
        servable: Requests that some mask fits, alone, at the largest budget of the replay.
        served_fraction_of_servable: Served ones as a share of those.
        refused: Requests that were told at once that they can never fit.
        queue_full: Requests that found no place in the queue.
        timed_out: Requests that gave up waiting.
        failed: Requests that ended in an error or were left over.
        queued: Requests that waited because there was no room beside what ran.
        preemptions: Times that a running request was put back into the queue.
        violation_byte_s: Integral of the measured bytes above the budget, in byte-seconds, idle
            time included; the budget is that which held when a step began.
        violations: Steps, or idle times, with measured bytes above it.
        late_byte_s: Byte-seconds above a budget that fell while a step ran, up to its end: what
            nobody who acts between steps can avoid.
        peak_bytes: Most bytes that were measured.
        budget_least_bytes: Least budget while the system ran.
        ttft_p50_s: Median time from arrival to the first token, of served requests; None where
            there are none.
        ttft_p95_s: 95th percentile.
        ttft_p99_s: 99th percentile.
        tpot_p50_s: Median time of an output token after the first.
        tpot_p95_s: 95th percentile.
        tpot_p99_s: 99th percentile.
        tokens: Tokens generated for served requests.
        tokens_per_s: The same a second, from the first arrival to the last token.
        duration_s: That time.
        busy_s: Seconds of work in it, decisions and switches included.
        controller_overhead_fraction: Seconds of deciding and switching as a share of that.
        decisions: Decisions that were made.
        decision_s: Seconds that they took.
        switches: Changes of the mask.
        switch_s: Seconds that they took.
        masks: Different masks under which tokens were generated.
        removed_mean: Blocks removed, mean over generated tokens.
        loss_mean: Mean over served requests of what the dense model loses on the generated
            tokens, less what it loses on its own greedy continuation of the same prompt and
            length: nats per token.
        loss_ci_low: Lower end of its 95 % interval over requests.
        loss_ci_high: Upper end.
        mask_loss_mean: Loss of the masks on held-out text, mean over generated tokens; None
            where it was not measured.
        generated_nll_mean: NLL of the generated tokens under the dense model, nats per token.
        same_fraction: Share of generated tokens that are the dense model's own.
        accuracy: Share of right answers among served requests with a known one.
        accuracy_n: How many of those there were.
        energy_j: Joules of the machine meanwhile; None where it does not tell.
        notes: What else there is to know of the system, such as its static mask.
        provenance: Model, load, budget, settings, versions and commit.
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
    energy_j: float | None
    notes: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    record_name = "A replay record"
    rerun = "run the replay again"

    @property
    def key(self) -> str:
        """What makes two rows the same result."""
        return row_key(self.system, self.provenance)


def row_key(system: str, provenance: Mapping[str, Any]) -> str:
    """As `ReplayRow.key`, known before the system is run."""
    return digest([system, provenance.get("depends_on", {})])
