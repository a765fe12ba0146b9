"""``python -m experiments.replay``: several systems on the same arrivals under a moving budget."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.config.replay_settings import ReplayConfig
from experiments.contexts import load_text
from experiments.replay.budgets import make_budget
from experiments.replay.figures import LABELS, ReplayRow, memory_over_time
from experiments.replay.quality import QualityEvaluator
from experiments.replay.system_run import Interval, System, SystemRun
from experiments.replay.systems import SystemFactory
from experiments.replay.workload import make_workload
from experiments.study.harness import Job, Study
from experiments.study.statistics import bootstrap_mean, wilson_interval
from experiments.study.table_format import TitledTable, mebibytes, percent, seconds
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer

LEGEND = (
    "Every system gets the same arrivals under the same budget. Over budget: measured bytes above "
    "the budget at the start of a step, integrated over time. Served: requests that got all their "
    "tokens. TTFT: time from arrival to first token; TPOT: time per output token after it; both of "
    "served requests, in the time of the replay, which skips idle time. ΔNLL of output: NLL of the "
    "generated tokens under the dense model minus that of its own greedy continuation of the same "
    "prompts, nats/token, with a 95 % interval over requests. ΔNLL of plans: rise in NLL on "
    "held-out text, nats/token. Removed: blocks. Lowered: kept blocks and caches below their "
    "native level. All three are means over generated tokens. Controller: decisions and switches "
    "as a share of all work."
)
_STEPS = 600  # approximate number of steps in a row


def replay_jobs(config: Config, folder: Path) -> Iterator[Job[ReplayRow]]:
    """Yield a job for each system; files that a system lacks are an error before any runs."""
    from rap_env.models.files.loading import load_llm

    settings, model = config.replay, config.model
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    memory = MemoryModel(llm)
    reference_bytes = memory.dense_peak_bytes(*settings.reference_shape)
    budget = make_budget(config.budget, reference_bytes)
    spec = config.budget if isinstance(config.budget, dict) else {"name": config.budget}
    workload = make_workload(config, llm)
    factory = SystemFactory(config, llm, workload, budget)
    depends_on = {
        "model": memory.facts.name,
        "model_fingerprint": memory.facts.fingerprint,
        "dtype": memory.facts.dtype,
        "num_layers": memory.facts.num_layers,
        "load_sha256": workload.provenance["sha256"],
        "budget": {key: _file_hash(v) if key == "path" else v for key, v in spec.items()},
        "reference_bytes": reference_bytes,
        "policies": [
            _file_hash(name) for name in (settings.policy, settings.knapsack, settings.frontier)
        ],
    }
    for name in settings.systems:
        decisions = folder / "decisions" / f"{name}.jsonl"
        run = SystemRun(settings, llm, workload, budget, decisions)
        measure = partial(replayed, config, folder, run, factory.make(name, run))
        yield Job(ReplayRow, (name,), depends_on, measure, facts={"load": workload.provenance})


def _file_hash(name: str) -> str:
    """Hash of a file's content; a name that is no file's stays."""
    path = Path(name).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def replayed(config: Config, folder: Path, run: SystemRun, system: System) -> ReplayRow:
    """Serve all requests with a system, and judge what it generated with the dense model."""
    run.log.unlink(missing_ok=True)  # left by an interrupted run of this system
    run.serve(system, progress=config.progress)
    run.llm.set_residency("resident")  # the evaluation needs the dense model
    evaluator = QualityEvaluator(
        run.llm, run.workload, folder / "references.jsonl", progress=config.progress
    )
    done = [(o, o.handle) for o in run.outcomes if o.outcome == "served" and o.handle]
    qualities = [evaluator.evaluate(o.request, h.token_ids) for o, h in done if h.token_ids]
    by_plan = Counter(plan for _, handle in done for plan in handle.plans)
    tokens = by_plan.total()
    ends = [handle.ended_s or 0.0 for _, handle in done]
    duration = max(ends, default=0.0) - run.workload.requests[0].time_s
    stats, chooser = run.stats, run.controller.chooser
    over = [interval for interval in run.intervals if interval.over_bytes]

    def mean_over_tokens(values: Sequence[float]) -> float | None:
        return float(np.average(values, weights=list(by_plan.values()))) if by_plan else None

    removed = [len(plan.removed) for plan in by_plan]
    lowered = [len(plan.levels) - len(plan.removed) for plan in by_plan]
    row = ReplayRow(
        system=system.name,
        outcomes=dict(Counter(outcome.outcome for outcome in run.outcomes)),
        preemptions=stats.preemptions,
        violation_byte_s=sum(interval.over_bytes * interval.duration_s for interval in over),
        violations=len(over),
        peak_bytes=max((interval.peak_bytes for interval in run.intervals), default=0),
        budget_least_bytes=run.budget.least(0.0, run.end_s),
        ttft_s=[round(o.ttft_s, 4) for o, _ in done if o.ttft_s is not None],
        tpot_s=[round(o.tpot_s, 4) for o, _ in done if o.tpot_s is not None],
        several_tokens=sum(request.new_tokens >= 2 for request in run.workload.requests),
        tokens_per_s=tokens / duration if duration > 0 else 0.0,
        overhead_fraction=stats.overhead_s / stats.busy_s if stats.busy_s else 0.0,
        decisions=chooser.decisions,
        decision_s=chooser.decision_s,
        switches=run.controller.switcher.switches,
        switch_s=run.controller.switcher.switch_s,
        plans=len(by_plan),
        removed_mean=mean_over_tokens(removed),
        lowered_mean=mean_over_tokens(lowered),
        losses=[round(quality.delta_nll, 4) for quality in qualities],
        mask_loss_mean=mean_over_tokens(held_out_delta_nll(config, run, list(by_plan))),
        same_fraction=sum(q.same for q in qualities) / tokens if tokens else None,
        right=[quality.right for quality in qualities if quality.right is not None],
        steps=sampled_steps(run.intervals),
    )
    run.outcomes.clear()  # their memory must not count while the next system runs
    run.intervals.clear()
    return row


def held_out_delta_nll(config: Config, run: SystemRun, plans: Sequence[Plan]) -> list[float]:
    """ΔNLL of plans on the first windows of the prompts' text, nats per token."""
    from rap_env.context.opening import open_store

    corpus = load_text(config.replay.text, "report", run.llm, progress=config.progress)
    windows = min(config.replay.mask_loss_windows, len(corpus.tokens))
    scorer = MaskScorer(run.llm, corpus.spread(windows), open_store(config.store))
    return [nll - scorer.dense_nll for nll in scorer.nll_many(list(plans))]


def sampled_steps(intervals: Sequence[Interval], count: int = _STEPS) -> list[list[Any]]:
    """About `count` entries of `ReplayRow.steps`, each of consecutive intervals."""
    if not intervals:
        return []
    start = intervals[0].time_s
    width = max(intervals[-1].end_s - start, 1e-9) / count
    groups: dict[int, list[Interval]] = {}
    for interval in intervals:
        groups.setdefault(int((interval.time_s - start) / width), []).append(interval)
    steps = []
    for group in groups.values():
        worst = max(group, key=lambda interval: interval.peak_bytes - interval.budget_bytes)
        lasted: Counter[Plan] = Counter()
        for interval in group:
            lasted[interval.plan] += interval.duration_s  # type: ignore[assignment]  # seconds
        times = [round(group[0].time_s, 4), round(group[-1].end_s, 4)]
        removed = sorted(max(lasted, key=lasted.__getitem__).removed)
        steps.append([*times, worst.peak_bytes, worst.budget_bytes, removed])
    return steps


def replay_tables(rows: Sequence[ReplayRow]) -> list[TitledTable]:
    """Memory, latency, quality and cost of each system."""
    memory, latency, quality, costs = [], [], [], []
    for row in rows:
        name, outcomes = LABELS[row.system], Counter(row.outcomes)
        failed = outcomes["timed_out"] + outcomes["failed"] + outcomes["unserved"]
        memory.append([
            name, percent(row.served / row.requests),
            f"{outcomes['refused'] + outcomes['queue_full']}", f"{failed}", row.over_words,
            f"{row.violations}", mebibytes(row.peak_bytes),
        ])  # fmt: skip
        latency.append([
            name, *percentile_cells(row.ttft_s), *percentile_cells(row.tpot_s),
            f"{row.tokens_per_s:.1f}",
        ])  # fmt: skip
        quality.append([
            name, str(bootstrap_mean(row.losses)) if row.losses else "-",
            _number(row.mask_loss_mean, 3), percent(row.same_fraction, 0), _accuracy(row.right),
            _number(row.removed_mean, 1), _number(row.lowered_mean, 1),
        ])  # fmt: skip
        costs.append([
            name, f"{row.switches}", _each(row.switch_s, row.switches), f"{row.decisions}",
            _each(row.decision_s, row.decisions), f"{row.plans}", f"{row.preemptions}",
            percent(row.overhead_fraction, 2),
        ])  # fmt: skip
    headers = {
        "Served, and memory": ("Served", "Refused", "Failed", "Over budget", "Steps over",
                               "Peak"),
        "Latency": ("TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "Tokens/s"),
        "Quality": ("ΔNLL of output", "ΔNLL of plans", "Same", "Accuracy", "Removed", "Lowered"),
        "Cost of adaptation": ("Switches", "each", "Decisions", "each", "Plans", "Preempted",
                               "Controller"),
    }  # fmt: skip
    return [
        TitledTable((["System", *header], lines), title)
        for (title, header), lines in zip(
            headers.items(), (memory, latency, quality, costs), strict=True
        )
    ]


def percentile_cells(values: Sequence[float]) -> list[str]:
    """Median, 95th and 99th percentile of seconds."""
    return [seconds(p) for p in np.percentile(values, [50, 95, 99])] if values else ["-"] * 3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _each(total_s: float, count: int) -> str:
    return seconds(total_s / count) if count else "-"


def _accuracy(right: Sequence[bool]) -> str:
    if not right:
        return "-"
    share = sum(right) / len(right)
    low, high = wilson_interval(share, len(right))
    return f"{percent(share, 0)} [{100 * low:.0f}, {100 * high:.0f}] of {len(right)}"


def replay_words(rows: Sequence[ReplayRow]) -> str:
    """What was replayed, and what the columns mean."""
    if not rows:
        return "No system was run."
    load, depends = rows[0].provenance["load"], rows[0].depends_on
    return (
        f"{rows[0].requests} requests of {load['trace']} within {load['last_arrival_s']:.0f} s "
        f"(prompts of {load['prompt_tokens_mean']:.0f} and answers of "
        f"{load['new_tokens_mean']:.0f} tokens on average) to {depends['model']}, under a moving "
        f"budget ({depends['budget']['name']}; at least {mebibytes(rows[0].budget_least_bytes)}, "
        f"100 % being {mebibytes(depends['reference_bytes'])}).\n\n{LEGEND}"
    )


STUDY = Study(
    "replay",
    "Replay",
    [ReplayRow],
    replay_jobs,
    replay_tables,
    words=replay_words,
    figures={"replay_memory": memory_over_time},
    frozen=(
        "model", "budget", "calibration", "seed",
        *(f"replay.{field.name}" for field in fields(ReplayConfig) if field.name != "systems"),
    ),
    captions=False,
)  # fmt: skip
