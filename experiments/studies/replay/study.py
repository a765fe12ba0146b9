"""Several serving systems on the same arrivals under the same moving budget: rows and tables.

What a system generated is judged by the native model, after the system has finished.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from experiments.config import Config
from experiments.config.common import parse_shape
from experiments.config.study_settings import ReplayConfig
from experiments.contexts import load_model, load_text
from experiments.studies.replay.serving import SystemRun, check_system, system_policy
from experiments.studies.replay.workload import ReplayRequest, cotenant_budget, make_requests
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.statistics import bootstrap_mean
from experiments.study.table_format import TitledTable, mebibytes, percent, seconds
from rap_env.context.opening import open_store
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.runtime.request_handle import RequestHandle
from rap_env.scoring.plan_runner import token_nll
from rap_env.scoring.scorer import PlanScorer

LABELS = {
    "dense": "Dense",
    "static_gsi": "Static, GSI",
    "static_gsi_lean": "Static, lean",
    "static_shortgpt": "Static, ShortGPT",
    "greedy": "Greedy, live",
    "frontier": "Frontier table",
    "rap": "RAP policy",
    "rap-v0": "RAP policy",
    "oracle": "Oracle",
    "knapsack": "Knapsack over levels",
    "uniform_native_native": "Uniform, native weights, native cache",
    "uniform_native_int8": "Uniform, native weights, int8 cache",
    "uniform_native_int4": "Uniform, native weights, int4 cache",
    "uniform_native_int2": "Uniform, native weights, int2 cache",
}
"""Names of systems in tables, also of those that only the committed records have."""


@dataclass(frozen=True)
class ReplayRow(Record):
    """One system. Times are seconds of the replay's clock.

    Attributes:
        system: Its name, as in ``replay.systems``.
        outcomes: Number of requests that were ``served`` to their last token; ``refused``,
            because no plan can ever fit them or the queue was full; or failed for another
            reason.
        preemptions: How often a running request was returned to the queue.
        violation_byte_s: Integral of the measured bytes above the budget at the start of each
            step, in byte-seconds, idle time included.
        violations: Steps and idle intervals with measured bytes above the budget.
        peak_bytes: Maximum of the measured bytes.
        budget_least_bytes: Minimum of the budget while the system ran.
        ttft_s: Time to the first token of each served request, from its arrival.
        tpot_s: Time per output token after the first, of each with at least two tokens.
        tokens_per_s: Tokens of served requests per second from first arrival to last token.
        overhead_fraction: Seconds of decisions and switches as a share of the work.
        decisions: Number of decisions; `decision_s` are their seconds.
        switches: Changes of the plan; `switch_s` are their seconds.
        plans: Different plans under which tokens were generated.
        removed_mean: Removed blocks, mean over generated tokens.
        lowered_mean: Kept items below their native level, mean over generated tokens.
        losses: NLL of each served request's tokens under the dense model minus that of the
            dense model's own greedy continuation of the same prompt and length, nats per
            token.
        mask_loss_mean: ΔNLL of the plans on held-out text, mean over generated tokens, nats
            per token.
        same_fraction: Share of generated tokens equal to the dense model's own continuation.
    """

    file = "replay.jsonl"
    record_name = "A replay record"
    identity = ("system",)

    system: str
    outcomes: dict[str, int]
    preemptions: int
    violation_byte_s: float
    violations: int
    peak_bytes: int
    budget_least_bytes: int
    ttft_s: list[float]
    tpot_s: list[float]
    tokens_per_s: float
    overhead_fraction: float
    decisions: int
    decision_s: float
    switches: int
    switch_s: float
    plans: int
    removed_mean: float | None
    lowered_mean: float | None
    losses: list[float]
    mask_loss_mean: float | None
    same_fraction: float | None

    @property
    def label(self) -> str:
        """The system in tables."""
        return LABELS.get(self.system, self.system)

    @property
    def served(self) -> float:
        """Share of the requests that got all their tokens."""
        return self.outcomes.get("served", 0) / sum(self.outcomes.values())

    @property
    def over(self) -> str:
        """The byte-seconds above the budget, in words."""
        amount = self.violation_byte_s / 1e6
        return "0" if amount == 0 else f"{amount:{',.0f' if amount >= 100 else '.3g'}} MB s"


def replay_jobs(config: Config, folder: Path) -> Iterator[Job[ReplayRow]]:
    """Yield a job for each system; files that a system lacks are an error before any runs."""
    settings = config.replay
    for name in settings.systems:
        check_system(name)
    llm = load_model(config)
    memory, judge = MemoryModel(llm), OutputJudge(llm)
    reference_bytes = memory.native_peak_bytes(*parse_shape(settings.reference))
    budget = cotenant_budget(config.budget, reference_bytes)
    requests, load = make_requests(config, llm)
    depends_on = {
        "model": memory.facts.name,
        "model_fingerprint": memory.facts.fingerprint,
        "dtype": memory.facts.dtype,
        "load_sha256": load["sha256"],
        "budget": asdict(config.budget),
        "reference_bytes": reference_bytes,
    }
    for source in settings.systems:
        path, run = Path(source), SystemRun(settings, llm, requests, budget)
        policy = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source
        measure = partial(replayed, path.name, config, run, system_policy(source, llm), judge)
        needed = {**depends_on, "policy": policy}
        yield Job(ReplayRow, (path.name,), needed, measure, facts={"load": load})


def replayed(
    name: str, config: Config, run: SystemRun, policy: Policy, judge: OutputJudge
) -> ReplayRow:
    """Serve all requests with a policy, and judge what it generated with the native model."""
    stats = run.serve(policy)
    run.llm.set_residency("resident")  # the native model judges
    chooser, switcher = run.controller.chooser, run.controller.switcher
    pairs = zip(run.requests, run.handles, strict=True)
    served = [(r, h) for r, h in pairs if h is not None and outcome(h) == "served"]
    by_plan = Counter(plan for _, handle in served for plan in handle.plans)
    tokens = by_plan.total()
    plan_losses = held_out_delta_nll(config, run.llm, list(by_plan))
    seconds_s = max((h.ended_s or 0.0 for _, h in served), default=0.0) - run.requests[0].time_s
    over = [interval for interval in run.intervals if interval.over_bytes]

    def mean_over_tokens(values: Sequence[float]) -> float | None:
        return float(np.average(values, weights=list(by_plan.values()))) if by_plan else None

    row = ReplayRow(
        system=name,
        outcomes=dict(Counter(map(outcome, run.handles))),
        preemptions=stats.preemptions,
        violation_byte_s=sum(i.over_bytes * (i.end_s - i.time_s) for i in over),
        violations=len(over),
        peak_bytes=max(interval.peak_bytes for interval in run.intervals),
        budget_least_bytes=min(run.budget.between(0.0, run.intervals[-1].end_s)),
        ttft_s=[round((h.first_token_s or 0.0) - r.time_s, 4) for r, h in served],
        tpot_s=[round(tpot_s(h), 4) for _, h in served if len(h.token_ids) > 1],
        tokens_per_s=tokens / seconds_s if tokens else 0.0,
        overhead_fraction=stats.overhead_s / stats.busy_s if stats.busy_s else 0.0,
        decisions=chooser.decisions,
        decision_s=chooser.decision_s,
        switches=switcher.switches,
        switch_s=switcher.switch_s,
        plans=len(by_plan),
        removed_mean=mean_over_tokens([len(plan.removed) for plan in by_plan]),
        lowered_mean=mean_over_tokens([len(p.levels) - len(p.removed) for p in by_plan]),
        losses=[round(judge.delta_nll(r, h.token_ids), 4) for r, h in served],
        mask_loss_mean=mean_over_tokens(plan_losses),
        same_fraction=sum(judge.same(r, h.token_ids) for r, h in served) / max(1, tokens),
    )
    run.handles.clear()  # their memory must not count while the next system runs
    run.intervals.clear()
    return row


def outcome(handle: RequestHandle | None) -> str:
    """What became of a request, as in `ReplayRow.outcomes`."""
    if handle is None or handle.rejection == "infeasible":
        return "refused"
    if handle.reason in ("length", "stop"):
        return "served"
    return handle.rejection or handle.reason or "unserved"


def tpot_s(handle: RequestHandle) -> float:
    """Time per output token after the first, of a request with at least two tokens."""
    first_s, ended_s = handle.first_token_s or 0.0, handle.ended_s or 0.0
    return (ended_s - first_s) / (len(handle.token_ids) - 1)


class OutputJudge:
    """Measures the quality of generated tokens with a live model, whose plan must be native."""

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self._references: dict[ReplayRequest, list[int]] = {}

    def reference(self, request: ReplayRequest) -> list[int]:
        """Return the native model's greedy continuation of a request; it is computed once."""
        if request not in self._references:
            batch, tokens = LiveBatch(self._llm), list[int]()
            logits = batch.prefill([request.prompt_ids])
            while len(tokens) < request.new_tokens:
                logits = batch.extend(tokens[-1:]) if tokens else logits
                tokens.append(int(logits[0].argmax()))
            batch.close()
            self._references[request] = tokens
        return self._references[request]

    def delta_nll(self, request: ReplayRequest, token_ids: list[int]) -> float:
        """NLL of tokens above that of the reference, nats per token."""
        prompt_ids = list(request.prompt_ids)
        return self._nll(prompt_ids, token_ids) - self._nll(prompt_ids, self.reference(request))

    def same(self, request: ReplayRequest, token_ids: list[int]) -> int:
        """Number of tokens equal to the reference at the same position."""
        return sum(a == b for a, b in zip(token_ids, self.reference(request), strict=False))

    @torch.inference_mode()
    def _nll(self, prompt_ids: list[int], token_ids: list[int]) -> float:
        ids = torch.tensor([prompt_ids + token_ids], device=self._llm.device)
        states = self._llm.hidden(ids)[0, len(prompt_ids) - 1 : -1]
        logits = PartialForward(self._llm).logits(states)
        return float(token_nll(logits, ids[0, len(prompt_ids) :]).double().mean())


def held_out_delta_nll(config: Config, llm: ElasticLLM, plans: Sequence[Plan]) -> list[float]:
    """ΔNLL of plans on the first windows of the prompts' text, nats per token."""
    corpus = load_text(config.replay.text, "report", llm, progress=config.progress)
    windows = min(config.replay.mask_loss_windows, len(corpus.tokens))
    scorer = PlanScorer(llm, corpus.spread(windows), open_store(config.store))
    return [nll - scorer.native_nll for nll in scorer.nll_many(list(plans))]


def percentile(level: int, name: str, row: Record) -> str:
    """Format a percentile of the seconds in a field of a row; a dash without any."""
    values = getattr(row, name)
    return seconds(np.percentile(values, level)) if values else "-"


def decimals(value: float | None, digits: int) -> str:
    """Format a number with so many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _each(total_s: float, count: int) -> str:
    return seconds(total_s / count) if count else "-"


def _failed(row: ReplayRow) -> int:
    return sum(n for name, n in row.outcomes.items() if name not in ("served", "refused"))


TABLES: dict[str, list[tuple[str, Callable[[ReplayRow], str]]]] = {
    "Served, and memory": [
        ("Served", lambda row: percent(row.served)),
        ("Refused", lambda row: f"{row.outcomes.get('refused', 0)}"),
        ("Failed", lambda row: f"{_failed(row)}"),
        ("Over budget", lambda row: row.over),
        ("Steps over", lambda row: f"{row.violations}"),
        ("Peak", lambda row: mebibytes(row.peak_bytes)),
    ],
    "Latency": [
        ("TTFT p50", partial(percentile, 50, "ttft_s")),
        ("p95", partial(percentile, 95, "ttft_s")),
        ("p99", partial(percentile, 99, "ttft_s")),
        ("TPOT p50", partial(percentile, 50, "tpot_s")),
        ("p95", partial(percentile, 95, "tpot_s")),
        ("p99", partial(percentile, 99, "tpot_s")),
        ("Tokens/s", lambda row: f"{row.tokens_per_s:.1f}"),
    ],
    "Quality": [
        ("ΔNLL of output", lambda row: str(bootstrap_mean(row.losses)) if row.losses else "-"),
        ("ΔNLL of plans", lambda row: decimals(row.mask_loss_mean, 3)),
        ("Same", lambda row: percent(row.same_fraction, 0)),
        ("Removed", lambda row: decimals(row.removed_mean, 1)),
        ("Lowered", lambda row: decimals(row.lowered_mean, 1)),
    ],
    "Cost of adaptation": [
        ("Switches", lambda row: f"{row.switches}"),
        ("each", lambda row: _each(row.switch_s, row.switches)),
        ("Decisions", lambda row: f"{row.decisions}"),
        ("each", lambda row: _each(row.decision_s, row.decisions)),
        ("Plans", lambda row: f"{row.plans}"),
        ("Preempted", lambda row: f"{row.preemptions}"),
        ("Controller", lambda row: percent(row.overhead_fraction, 2)),
    ],
}
"""The columns of each table."""


def replay_tables(rows: Sequence[ReplayRow]) -> list[TitledTable]:
    """Memory, latency, quality and cost of each system."""
    tables = []
    for title, columns in TABLES.items():
        header = ["System", *(name for name, _ in columns)]
        lines = [[row.label, *(show(row) for _, show in columns)] for row in rows]
        tables.append(TitledTable(pd.DataFrame(lines, columns=header), title))
    return tables


def replay_words(rows: Sequence[ReplayRow]) -> str:
    """What was replayed."""
    load, depends = rows[0].provenance["load"], rows[0].depends_on
    return (
        f"{sum(rows[0].outcomes.values())} requests of {load['trace']} within "
        f"{load['last_arrival_s']:.0f} s (prompts of {load['prompt_tokens_mean']:.0f} and answers "
        f"of {load['new_tokens_mean']:.0f} tokens on average) to {depends['model']}, under a "
        f"moving budget (cotenants; at least {mebibytes(rows[0].budget_least_bytes)}, 100 % being "
        f"{mebibytes(depends['reference_bytes'])})."
    )


STUDY = Study(
    "replay",
    "Replay",
    [ReplayRow],
    replay_jobs,
    replay_tables,
    words=replay_words,
    frozen=(
        *("model", "budget", "seed"),
        *(f"replay.{field.name}" for field in fields(ReplayConfig) if field.name != "systems"),
    ),
)
