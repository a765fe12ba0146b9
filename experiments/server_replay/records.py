"""Rows of ``server_replay.jsonl``: one server within one budget, on the arrivals of a replay.

They are in order of time.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.study.records import Record


@dataclass(frozen=True)
class ServerReplayRow(Record):
    """One run of one server.

    Times are seconds of real time; those of a request count from its arrival. Percentiles and
    losses are of served requests; they are None without any.

    Attributes:
        system: Its name, as in ``server_replay.systems``.
        budget_bytes: Resident memory that the process may take.
        options: The server's options, without paths and address.
        startup_error: Why the server did not start; None if it did. No request is served then.
        context_tokens: Tokens of llama.cpp's cache; None for others.
        trial_starts: Starts of llama.cpp's server in the search for that number; None for others.
        model_bytes: Bytes of the model alone: for llama.cpp weights, cache and buffers as its log
            states them, for ``rap_model_memory`` its limit; None for others.
        requests: Requests that arrived.
        served: Requests whose answer ended as it should.
        refused: Requests that the server rejected.
        timed_out: Requests that the client gave up.
        failed: Requests whose stream or connection broke.
        reasons: Numbers of requests that were not served, by status code or error.
        peak_bytes: Maximum of the resident bytes, from the start of the process on.
        ready_bytes: Resident bytes when the server accepted requests.
        samples: Samples of the resident memory, one every 20 ms.
        samples_over: Samples above the budget.
        ttft_p50_s: Median time to the first token.
        ttft_p95_s: 95th percentile.
        ttft_p99_s: 99th percentile.
        tpot_p50_s: Median time per output token after the first.
        tpot_p95_s: 95th percentile.
        tpot_p99_s: 99th percentile.
        tokens: Tokens of served requests.
        tokens_per_s: `tokens` divided by `duration_s`.
        duration_s: Seconds from the first arrival to the last piece of an answer.
        cpu_s: CPU seconds of the server in that time.
        loss_mean: NLL of the answers under the dense model minus that of the dense model's own
            greedy continuation of the same prompts, mean over requests, nats per token.
        loss_ci_low: Lower end of its 95 % interval over requests.
        loss_ci_high: Upper end.
        same_fraction: Share of tokens equal to those of that continuation.
    """

    system: str
    budget_bytes: int
    options: list[str]
    startup_error: str | None
    context_tokens: int | None
    trial_starts: int | None
    model_bytes: int | None
    requests: int
    served: int
    refused: int
    timed_out: int
    failed: int
    reasons: dict[str, int]
    peak_bytes: int
    ready_bytes: int
    samples: int
    samples_over: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    tpot_p99_s: float | None
    tokens: int
    tokens_per_s: float
    duration_s: float
    cpu_s: float
    loss_mean: float | None
    loss_ci_low: float | None
    loss_ci_high: float | None
    same_fraction: float | None

    record_name = "A row of the replay on servers"
    rerun = "run the replay on servers again"
    identity = ("system", "budget_bytes")
