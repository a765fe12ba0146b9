"""``python -m experiments.ladder``: loss against bytes, by precision, by removal, and by both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Config
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, held_out_scorer, named_policy
from experiments.study.harness import Job, Study
from experiments.study.json_records import (
    DeltaNLLRecord,
    Record,
    RequestRecord,
    Shape,
    delta_nll_fields,
    request_field,
)
from experiments.study.plotting import (
    INK,
    Panel,
    draw_label,
    panel_figure,
    plain_log_ticks,
    scale_delta_nll,
)
from experiments.study.table_format import Table, TitledTable, percent, shape_words
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIFORM_CAPTION = (
    "One level for all weights and one for all caches (embeddings with the head at int8 where "
    "weights are lowered). ΔNLL over unquantised weights and caches, nats per token with a 95 % "
    "interval over windows; MiB of weights and KV cache for each request (batch x tokens)."
)
POLICY_CAPTION = (
    "At each budget (share of the unquantised model's peak) the ΔNLL of removing blocks alone, and "
    "of a knapsack over the levels of all items. A dash: not measured; *: exceeds the budget."
)
REMOVAL, KNAPSACK, UNIFORM, LLAMA = "#C8324B", "#00707F", "#6B7178", "#E0812F"
_LEAST_GAIN = 0.002  # nats per token

Point = tuple[float, float]
"""MiB and ΔNLL."""


@dataclass(frozen=True)
class LadderRow(RequestRecord, DeltaNLLRecord):
    """One plan under one request; ΔNLL is over the unquantised model.

    Attributes:
        method: ``"uniform"``: one level for all weights and one for all caches; ``"removal"``:
            blocks are removed and nothing else; ``"knapsack"``: over the levels of all items.
        name: The setting, such as ``"int4 / int8"`` (weights / caches); of a policy its budget.
        budget_fraction: Budget as a fraction of the unquantised model's peak; None for a setting.
        budget_bytes: The budget itself; None for a setting.
        held_bytes: Bytes of weights and KV cache.
        peak_bytes: Peak bytes of the plan, workspace included.
        fits: Whether the peak is within the budget; always true for a setting.
        levels: Levels of all items that are not native, by name.
        packed: Whether native weights are those of the model's file, packed; else unquantised.
    """

    file = "ladder.jsonl"
    record_name = "A record of the ladder"
    rerun = "run experiments.ladder again"
    identity = ("method", "name", "shape")

    method: str
    name: str
    budget_fraction: float | None
    budget_bytes: int | None
    held_bytes: int
    peak_bytes: int
    fits: bool
    levels: dict[str, str]
    packed: bool


@dataclass(frozen=True)
class LlamaCppRow(RequestRecord, DeltaNLLRecord):
    """One format of llama.cpp's cache under one request.

    Attributes:
        cache: Format of keys and values, such as ``"q8_0"``.
        held_bytes: Bytes of the model's tensors and of the KV cache that llama.cpp allocates.
        resident_bytes: Resident memory of a process whose cache is allocated and in which one
            sequence was run, beyond what the process had before it loaded the model.
    """

    file = "llama_cpp.jsonl"
    record_name = "A record of llama.cpp"
    rerun = "run experiments.ladder.llama_cpp again"
    identity = ("cache", "shape")

    cache: str
    held_bytes: int
    resident_bytes: int


def ladder_jobs(config: Config, folder: Path) -> Iterator[Job[LadderRow]]:
    """Yield the plans of all methods for all requests.

    The knapsack starts from the model as shipped, if its weights are packed, and its uniform
    settings are measured as well. Packaged policies of another model are left out, with a warning.

    Raises:
        UnknownNameError: There is no such policy or level.
        InvalidRequestError: The model cannot serve a request.
    """
    settings, model = config.ladder, config.model
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    llm = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    packed = MaskScorer(llm, report.corpus, context.store) if llm.facts.packed else None
    start = context.memory if packed is None else MemoryModel(llm)
    removing = named_policy(settings.removing_policy, context, context.memory)
    knapsack = named_policy(settings.knapsack, context, start)
    for shape in settings.shapes:
        whole = Request.at_fraction(context.memory, *shape, 1.0)
        uniform = partial(_job, "uniform", request=whole, fraction=None)
        for name, plan in uniform_settings(settings, context.memory.facts).items():
            yield uniform(name, plan, side=report, report=report)
        for caches in settings.caches if packed else ():
            plan = Plan.uniform(start.facts.num_layers, caches=caches)
            yield uniform(f"as shipped / {caches}", plan, side=packed or report, report=report)
        for method, policy, budgets, side in (
            ("removal", removing, settings.removal_budgets, report),
            ("knapsack", knapsack, settings.budgets, packed or report),
        ):
            for fraction in sorted(set(budgets), reverse=True) if policy else ():
                request = Request.at_fraction(context.memory, *shape, fraction)
                plan = policy.choose(request) if policy else Plan()
                yield _job(
                    method, percent(fraction, 0), plan, request, fraction, side=side, report=report
                )  # fmt: skip


def _job(
    method: str,
    name: str,
    plan: Plan,
    request: Request,
    fraction: float | None,
    *,
    side: MaskScorer,
    report: MaskScorer,
) -> Job[LadderRow]:
    """The job of a plan of the model of `side`; `report` scores the unquantised model."""
    shape = request.batch_size, request.seq_len_tokens
    sizes = MemoryModel(side.llm).breakdown(plan, request)
    fields: dict[str, Any] = {
        "method": method,
        "name": name,
        "request": request_field(shape),
        "budget_fraction": fraction,
        "budget_bytes": None if fraction is None else request.budget_bytes,
        "held_bytes": sizes.peak - sizes.workspace,
        "peak_bytes": sizes.peak,
        "fits": fraction is None or sizes.peak <= request.budget_bytes,
        "levels": plan.levels,
        "packed": side is not report,
    }

    def measure() -> LadderRow:
        delta_nll = side.window_nll(plan) - report.window_nll(Plan())
        return LadderRow(**fields, **delta_nll_fields(delta_nll))

    return Job(
        LadderRow, (method, name, shape), {**report_identity(side), "plan": plan.levels}, measure
    )


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


def uniform_settings(settings: LadderConfig, facts: ModelFacts) -> dict[str, Plan]:
    """Plans with one level of weights and one of caches, by name; levels that all blocks have.

    Embeddings with the head are at int8 wherever weights are lowered, if they have that level.
    """
    plans = {}
    for level in WEIGHT_LEVELS[:-1]:
        if level in settings.weights and all(
            level in facts.weight_levels(index) for index in range(facts.num_blocks)
        ):
            lowered = level != "native" and "int8" in facts.embedding_levels
            for caches in settings.caches:
                plans[f"{level} / {caches}"] = Plan.uniform(
                    facts.num_layers,
                    weights=level,
                    caches=caches,
                    embeddings="int8" if lowered else "native",
                )
    return plans


class LossAgainstBytes:
    """The rows of the ladder, and those of llama.cpp where it is drawn beside them."""

    def __init__(self, rows: Sequence[Record]) -> None:
        self.plans = [row for row in rows if isinstance(row, LadderRow)]
        self.llama_cpp = [row for row in rows if isinstance(row, LlamaCppRow)]

    @cached_property
    def shapes(self) -> list[Shape]:
        """Requests of the plans."""
        return list(dict.fromkeys(row.shape for row in self.plans))

    def at(self, method: str, shape: Shape) -> list[LadderRow]:
        """Plans of one method and request, the largest first."""
        rows = [row for row in self.plans if (row.method, row.shape) == (method, shape)]
        return sorted(rows, key=lambda row: -row.held_bytes)

    def label(self, name: str) -> str:
        """Name of a uniform setting, with the dtype in the place of ``native``, such as bf16."""
        dtypes = {str(row.depends_on["dtype"]) for row in self.plans}
        native = dtypes.pop().replace("bfloat", "bf") if len(dtypes) == 1 else "native"
        return name.replace("native", native)


def ladder_tables(data: LossAgainstBytes) -> list[TitledTable]:
    """Removal beside the knapsack, and uniform settings; those that there are rows for."""
    tables = []
    if policies := _policy_table(data):
        tables.append(TitledTable(policies, "Removal alone, and the ladder", POLICY_CAPTION))
    uniform = {(row.name, row.shape): row for row in data.plans if row.method == "uniform"}
    if uniform:
        labels = {row.name: data.label(row.name) for row in data.at("uniform", data.shapes[0])}
        table = table_by_shape("Weights / caches", labels, uniform)
        tables.append(TitledTable(table, "Uniform settings", UNIFORM_CAPTION))
    return tables


def table_by_shape(
    corner: str, labels: dict[str, str], rows: Mapping[tuple[str, Shape], LadderRow | LlamaCppRow]
) -> Table:
    """ΔNLL of each setting, and its bytes for each request."""
    shapes = list(dict.fromkeys(shape for _, shape in rows))
    lines = []
    for name, label in labels.items():
        sizes = []
        for shape in shapes:
            row = rows[name, shape]
            resident = f" ({_mib(row.resident_bytes)})" if isinstance(row, LlamaCppRow) else ""
            sizes.append(f"{_mib(row.held_bytes)}{resident}")
        lines.append([label, nats(rows[name, shapes[0]]), *sizes])
    return [corner, "ΔNLL", *(f"{shape_words(shape)}, MiB" for shape in shapes)], lines


def _policy_table(data: LossAgainstBytes) -> Table | None:
    fractions = sorted({row.budget_fraction for row in data.plans if row.budget_fraction})[::-1]
    by_budget = {(row.method, row.shape, row.budget_fraction): row for row in data.plans}
    lines = []
    for shape in data.shapes:
        for fraction in fractions:
            rows = [by_budget.get((name, shape, fraction)) for name in ("removal", "knapsack")]
            measured = [row for row in rows if row]
            if measured:
                shown = [f"{nats(row)}{'' if row.fits else ' *'}" if row else "-" for row in rows]
                budget = _mib(measured[0].budget_bytes or 0)
                lines.append([shape_words(shape), percent(fraction, 0), budget, *shown])
    header = ["Request", "Budget", "MiB", "Removal alone", "Knapsack over levels"]
    return (header, lines) if lines else None


def nats(row: DeltaNLLRecord) -> str:
    """Format a ΔNLL with its interval, with four decimals where it is small."""
    mean, low, high = row.delta_nll, row.delta_nll_ci_low, row.delta_nll_ci_high
    digits = 4 if abs(mean) < 0.01 else 3
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def loss_against_bytes(data: LossAgainstBytes) -> Figure:
    """ΔNLL over bytes of weights and cache, a panel for each request, everything labelled."""
    parts = [
        Panel(
            partial(_draw_request, data, shape),
            f"{shape_words(shape)} tokens",
            "weights and KV cache (MiB, log scale)",
            "ΔNLL (nats/token)",
        )
        for shape in data.shapes
    ]
    return panel_figure(parts, columns=2, height=3.3, legend=0, same_axes=True, sharey=True)


def pareto(rows: Sequence[LadderRow]) -> list[LadderRow]:
    """Those rows than which no other row has fewer bytes and a lower loss, the largest first."""
    best: list[LadderRow] = []
    for row in sorted(rows, key=lambda row: (row.held_bytes, row.delta_nll)):
        if not best or row.delta_nll < best[-1].delta_nll:
            best.append(row)
    return best[::-1]


def labelled_settings(uniform: Sequence[LadderRow]) -> list[LadderRow]:
    """Settings that get a label: the unquantised one, and those of the front that clearly differ.

    A larger setting must lower the loss by a fifth, and by more than `_LEAST_GAIN`.
    """
    differing: list[LadderRow] = []
    for row in reversed(pareto(uniform)):
        if not differing or row.delta_nll < 0.8 * differing[-1].delta_nll - _LEAST_GAIN:
            differing.append(row)
    native = [r for r in uniform if not r.levels and not r.packed and r not in differing]
    return [*native, *reversed(differing)]


def _draw_request(data: LossAgainstBytes, shape: Shape, axis: Axes) -> None:
    uniform = data.at("uniform", shape)
    native = [row for row in uniform if not row.levels and not row.packed]
    lines = (("removal", REMOVAL, "blocks removed"), ("knapsack", KNAPSACK, "knapsack over levels"))
    for method, colour, words in lines:
        rows = [row for row in data.at(method, shape) if row.fits]
        if rows:
            points = _points([*native, *rows])
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5,
                      linewidth=1.5, zorder=4)  # fmt: skip
            draw_label(axis, points[-1], words, colour, above=method == "removal", bold=True)
    axis.plot(*zip(*_points(uniform), strict=True), "s", color=UNIFORM, markersize=3.5, zorder=5)
    for row in labelled_settings(uniform):
        unquantised = not row.levels and not row.packed
        draw_label(axis, _points([row])[0], data.label(row.name), INK, above=True, left=unquantised)
    labelled: LlamaCppRow | None = None
    for cached in sorted(data.llama_cpp, key=lambda row: row.held_bytes):
        if cached.shape != shape:
            continue
        (point,) = _points([cached])
        axis.plot(*point, "D", color=LLAMA, markersize=4, zorder=6)
        # Labels of points that nearly coincide would hide each other.
        if labelled is None or cached.delta_nll < labelled.delta_nll / 1.5:
            draw_label(axis, point, cached.cache, LLAMA, above=labelled is None)
            labelled = cached
    scale_delta_nll(axis)
    axis.set_xscale("log")
    plain_log_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7), ",.0f")


def _points(rows: Sequence[LadderRow] | Sequence[LlamaCppRow]) -> list[Point]:
    return [(row.held_bytes / 2**20, row.delta_nll) for row in rows]


STUDY = Study(
    "ladder",
    "The ladder",
    [LadderRow],
    ladder_jobs,
    ladder_tables,
    data=LossAgainstBytes,
    figures={"loss_against_bytes": loss_against_bytes},
    frozen=("model", "evaluate.text"),
)
