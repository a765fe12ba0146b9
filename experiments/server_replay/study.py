"""``python -m experiments.server_replay``: play the same arrivals against several servers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.errors import ExperimentError
from experiments.replay.quality import QualityEvaluator
from experiments.replay.study import percentile_cells
from experiments.replay.workload import Workload, make_workload
from experiments.server_replay.client import Answer, Client
from experiments.server_replay.processes import Sample, ServerProcess
from experiments.server_replay.systems import System, Systems
from experiments.study.harness import Job, Study
from experiments.study.records import Record
from experiments.study.statistics import bootstrap_mean
from experiments.study.tables import TitledTable, mebibytes, percent
from rap_env.serving.prompts import stop_tokens
from rap_env.serving.settings import parse_bytes

LEGEND = (
    "Each server gets the same arrivals over HTTP in real time, with one thread and greedy "
    "decoding; its answers have as many tokens as asked for. Budget: resident memory of the whole "
    "process. Peak, Over: maximum of the resident memory, sampled from outside every 20 ms from "
    "the start of the process on, and samples above the budget. Model: bytes of weights, cache and "
    "compute buffers, as llama.cpp's log states them; `rap, that as model memory` gets this number "
    "of llama.cpp with a cache in f16 as `--model-memory`, for the model alone, so that "
    "interpreter and libraries come on top of it. Context: tokens of llama.cpp's cache, found with "
    "so many trial starts. TTFT: time from arrival to first token; TPOT: time per output token "
    "after it; both of served requests. CPU: CPU seconds of the server. ΔNLL: NLL of the answers "
    "under the dense model minus that of its own greedy continuation of the same prompts, "
    "nats/token, with a 95 % interval over requests. Same: tokens equal to that continuation."
)
LABELS = {
    "rap": "rap",
    "rap_model_memory": "rap, that as model memory",
    "llama_f16": "llama.cpp, f16 cache",
    "llama_q8_0": "llama.cpp, q8_0 cache",
    "llama_q4_0": "llama.cpp, q4_0 cache",
}
"""Names of systems in tables, in their order there."""

_ARRIVALS = (
    "trace", "traffic", "arrivals_per_minute", "minutes", "every", "time_scale", "token_scale",
    "new_token_scale", "max_prompt_tokens", "max_new_tokens", "text", "known_share", "known_task",
)  # fmt: skip
_OWN = ("slots", "batch_tokens", "max_starts", "spare_mib", "timeout_s")


@dataclass(frozen=True)
class ServerReplayRow(Record):
    """One run of one server within one budget. Times are seconds of real time.

    Attributes:
        system: Its name, as in ``server_replay.systems``.
        budget_bytes: Resident memory that the process may take.
        options: The server's options, without paths and address.
        startup_error: Why the server did not start; None if it did. No request is served then.
        context_tokens: Tokens of llama.cpp's cache; None for others.
        trial_starts: Starts of llama.cpp's server in the search for that number; None for others.
        model_bytes: Bytes of the model alone: for llama.cpp weights, cache and buffers as its log
            states them, for ``rap_model_memory`` its limit; None for others.
        outcomes: Number of requests with each of `experiments.server_replay.client.OUTCOMES`.
        peak_bytes: Maximum of the resident bytes, from the start of the process on.
        samples: Samples of the resident memory, one every 20 ms.
        samples_over: Samples above the budget.
        ttft_s: Time to the first token of each served request, from its arrival.
        tpot_s: Time per output token after the first.
        tokens_per_s: Tokens of served requests per second from first arrival to last piece.
        cpu_s: CPU seconds of the server in that time.
        losses: NLL of each answer under the dense model minus that of the dense model's own greedy
            continuation of the same prompt, nats per token.
        same_fraction: Share of tokens equal to those of that continuation.
    """

    file = "server_replay.jsonl"
    record_name = "A row of the replay on servers"
    rerun = "run the replay on servers again"
    identity = ("system", "budget_bytes")

    system: str
    budget_bytes: int
    options: list[str]
    startup_error: str | None
    context_tokens: int | None
    trial_starts: int | None
    model_bytes: int | None
    outcomes: dict[str, int]
    peak_bytes: int
    samples: int
    samples_over: int
    ttft_s: list[float]
    tpot_s: list[float]
    tokens_per_s: float
    cpu_s: float
    losses: list[float]
    same_fraction: float | None


@dataclass(frozen=True)
class _Shared:
    """What all runs share: the requests, and the model that judges answers."""

    config: Config
    systems: Systems
    workload: Workload
    evaluator: QualityEvaluator
    llm: Any

    def row(self, name: str, budget_bytes: int, provenance: dict[str, Any]) -> ServerReplayRow:
        """Start a server within a budget, send all requests, and judge its answers."""
        settings, requests = self.config.server_replay, self.workload.requests
        system, error = System([], [], ""), None
        answers = [Answer(request, "refused", reason="no server") for request in requests]
        samples: Sequence[Sample] = ()
        began_s = ended_s = 0.0
        try:
            system = self.systems.system(name, budget_bytes)
            with ServerProcess(system.command, system.ready) as server:
                banned_ids = stop_tokens(self.llm, self.llm.tokenizer)
                client = Client(server.url, settings.timeout_s, banned_ids)
                began_s = time.monotonic()
                answers = client.play(requests)
                ended_s = time.monotonic()
            samples = server.sampler.samples
        except ExperimentError as failed:
            error = str(failed)
        done = [answer for answer in answers if answer.outcome == "served"]
        judged, tokens = [], 0
        for answer in done:  # tokenised again, since not every server gives the ids of its tokens
            ids = self.llm.tokenizer(answer.text, add_special_tokens=False).input_ids
            tokens += len(ids)
            judged += [self.evaluator.evaluate(answer.request, ids)] if ids else []
        last_s = max((a.request.time_s + a.last_s for a in done if a.last_s is not None), default=0)
        duration = last_s - requests[0].time_s
        within = [s for s in samples if began_s <= s.time_s <= ended_s]
        return ServerReplayRow(
            system=name,
            budget_bytes=budget_bytes,
            options=system.options,
            startup_error=error,
            context_tokens=system.context_tokens,
            trial_starts=system.trial_starts,
            model_bytes=system.model_bytes,
            outcomes=dict(Counter(answer.outcome for answer in answers)),
            peak_bytes=max((sample.resident for sample in samples), default=0),
            samples=len(samples),
            samples_over=sum(sample.resident > budget_bytes for sample in samples),
            ttft_s=[answer.first_s for answer in done if answer.first_s is not None],
            tpot_s=[answer.tpot_s for answer in done if answer.tpot_s is not None],
            tokens_per_s=sum(a.tokens for a in done) / duration if duration > 0 else 0.0,
            cpu_s=within[-1].cpu_s - within[0].cpu_s if within else 0.0,
            losses=[quality.delta_nll for quality in judged],
            same_fraction=sum(quality.same for quality in judged) / tokens if tokens else None,
            provenance=provenance,
        )


def server_jobs(config: Config, folder: Path) -> Iterator[Job[ServerReplayRow]]:
    """Yield a job for each budget and system, in an order that is reversed with each budget.

    Raises:
        ExperimentError: llama.cpp's server is wanted, and it is not installed.
    """
    from rap_env.models.files.loading import load_llm

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports each request
    settings, model = config.server_replay, config.model
    systems = Systems(config, folder)
    llm = load_llm(model.name, device="cpu", dtype=model.dtype, weights=model.weights)
    workload = make_workload(config, llm)
    systems.open(llm, workload)
    references = folder / "references.jsonl"
    evaluator = QualityEvaluator(llm, workload, references, progress=config.progress)
    shared = _Shared(config, systems, workload, evaluator, llm)
    values = asdict(settings)
    for number, text in enumerate(settings.budgets):
        budget_bytes = parse_bytes("server_replay.budgets", text)
        for name in settings.systems[:: -1 if number % 2 else 1]:
            depends_on = {
                "model": Path(model.name).name,
                "model_fingerprint": llm.facts.fingerprint,
                "dtype": llm.facts.dtype,
                "load_sha256": workload.provenance["sha256"],
                "settings": {key: values[key] for key in _OWN},
                "llama_cpp": None if name == "rap" else systems.llama_version,
            }
            yield Job(
                ServerReplayRow,
                (name, budget_bytes),
                depends_on,
                partial(shared.row, name, budget_bytes),
                facts={"load": workload.provenance},
            )


def server_tables(rows: Sequence[ServerReplayRow]) -> list[TitledTable]:
    """Memory, latency and quality of the servers, for each budget."""
    tables = []
    for budget in dict.fromkeys(row.budget_bytes for row in rows):
        own = [row for row in rows if row.budget_bytes == budget]
        own.sort(key=lambda row: list(LABELS).index(row.system))
        started = [row for row in own if row.startup_error is None]
        failed = [f"{LABELS[r.system]}: {r.startup_error}" for r in own if r.startup_error]
        words = f"Within {mebibytes(budget)}"
        memory = ["Server", "Served", "Not served", "Peak", "Over", "Model", "Context", "Starts"]
        times = ["Server", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "Tokens/s", "CPU"]
        tables += [
            TitledTable((memory, [_memory_cells(row) for row in own]), words, " ".join(failed)),
            TitledTable((times, [_latency_cells(row) for row in started]), f"{words}: latency"),
            TitledTable(
                (["Server", "ΔNLL", "Same"], [_quality_cells(row) for row in started]),
                f"{words}: quality",
            ),
        ]
    return tables


def _memory_cells(row: ServerReplayRow) -> list[str]:
    outcomes = row.outcomes
    others = [f"{n} {name.replace('_', ' ')}" for name, n in outcomes.items() if name != "served"]
    return [
        LABELS[row.system], percent(outcomes.get("served", 0) / sum(outcomes.values()), 0),
        ", ".join(others) or "-",
        mebibytes(row.peak_bytes) if row.samples else "-",
        f"{row.samples_over:,} of {row.samples:,}" if row.samples else "-",
        "-" if row.model_bytes is None else mebibytes(row.model_bytes),
        "-" if row.context_tokens is None else f"{row.context_tokens:,}",
        "-" if row.trial_starts is None else f"{row.trial_starts}",
    ]  # fmt: skip


def _latency_cells(row: ServerReplayRow) -> list[str]:
    times = [*percentile_cells(row.ttft_s), *percentile_cells(row.tpot_s)]
    return [LABELS[row.system], *times, f"{row.tokens_per_s:.1f}", f"{row.cpu_s:.0f} s"]


def _quality_cells(row: ServerReplayRow) -> list[str]:
    delta_nll = str(bootstrap_mean(row.losses)) if row.losses else "-"
    return [LABELS[row.system], delta_nll, percent(row.same_fraction, 0)]


def server_words(rows: Sequence[ServerReplayRow]) -> str:
    """What was replayed, and what the columns mean."""
    if not rows:
        return "No server was run."
    load, depends = rows[0].provenance["load"], rows[0].depends_on
    versions = {row.depends_on["llama_cpp"] for row in rows} - {None}
    llama = f" llama.cpp is version {', '.join(sorted(versions))}." if versions else ""
    return (
        f"{sum(rows[0].outcomes.values())} requests of {load['trace']} within "
        f"{load['last_arrival_s']:.0f} s (prompts of {load['prompt_tokens_mean']:.0f} and answers "
        f"of {load['new_tokens_mean']:.0f} tokens on average) to {depends['model']}, at most "
        f"{depends['settings']['slots']} at a time.{llama}\n\n{LEGEND}"
    )


STUDY = Study(
    "server_replay",
    "Replay on servers",
    [ServerReplayRow],
    server_jobs,
    server_tables,
    words=server_words,
    frozen=(
        "model", "seed", *(f"server_replay.{name}" for name in _OWN),
        *(f"replay.{name}" for name in _ARRIVALS),
    ),
)  # fmt: skip
