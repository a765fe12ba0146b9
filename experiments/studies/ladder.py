"""``python -m experiments.studies.ladder``: loss against bytes, by precision, by removal, by both.

Beside them stand the formats of llama.cpp's cache, on the same file and windows of token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import Config
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, held_out_scorer, measured_on, named_policy
from experiments.launch import launch
from experiments.llama_cpp import LlamaCpp, gguf_file, need_llama_cpp
from experiments.study.harness import Job, Published, Study, first_section
from experiments.study.json_records import (
    DeltaNLLRecord,
    RequestRecord,
    Shape,
    delta_nll_fields,
    request_field,
)
from experiments.study.plotting import Panel, panel_figure, plain_log_ticks, scale_delta_nll
from experiments.study.table_format import (
    TitledTable,
    columns_table,
    crossed_table,
    percent,
    precise,
    shape_words,
)
from rap_env.levels import WEIGHT_LEVELS, WeightLevel
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTINGS_CAPTION = (
    "One level for all weights and one for all caches (embeddings with the head at int8 where "
    "weights are lowered), and llama.cpp's caches on the same file and windows. ΔNLL over "
    "unquantised weights and caches, nats per token with a 95 % interval over windows; MiB of "
    "weights and KV cache for each request (batch x tokens)."
)
BUDGETS_CAPTION = (
    "At each budget (share of the unquantised model's peak) the ΔNLL of removing blocks alone, and "
    "of a knapsack over the levels of all items. A dash: not measured; *: exceeds the budget."
)
LOOKS = {
    "removal": ("blocks removed", "#C8324B", "o-"),
    "knapsack": ("knapsack over levels", "#00707F", "o-"),
    "uniform": ("one level for weights, one for caches", "#6B7178", "s"),
    "llama.cpp": ("llama.cpp's caches", "#E0812F", "D"),
}
"""Label, colour and marker of each method of `LadderRow`."""


@dataclass(frozen=True)
class LadderRow(RequestRecord, DeltaNLLRecord):
    """One plan, or one format of llama.cpp's cache, under one request.

    ΔNLL is over the unquantised model.

    Attributes:
        method: ``"uniform"``: one level for all weights and one for all caches; ``"removal"``:
            blocks are removed and nothing else; ``"knapsack"``: over the levels of all items;
            ``"llama.cpp"``.
        name: The setting, such as ``"int4 / int8"`` (weights / caches) or ``"q8_0"``; of a policy
            its budget, as a share of the unquantised model's peak.
        held_bytes: Bytes of weights and KV cache, as llama.cpp allocates them or as computed.
        fits: Whether the peak is within the budget; always true for a setting.
        levels: Levels of all items that are not native, by name.
    """

    file = "ladder.jsonl"
    identity = ("method", "name", "shape")

    method: str
    name: str
    held_bytes: int
    fits: bool = True
    levels: dict[str, str] = field(default_factory=dict)


def ladder_jobs(config: Config, folder: Path) -> Iterator[Job[LadderRow]]:
    """Yield the plans of all methods, and llama.cpp's caches, for all requests.

    The knapsack starts from the model as shipped, if its weights are packed, and its uniform
    settings are measured as well. Packaged policies of another model are left out, with a warning.

    Raises:
        UnknownNameError: There is no such policy or level.
        InvalidRequestError: The model cannot serve a request.
        ExperimentError: ``ladder.llama_cpp_caches`` has entries, but llama.cpp is not installed, or
            the model comes from no GGUF file.
    """
    settings, model, context = config.ladder, config.model, build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    if settings.llama_cpp_caches:
        yield from _llama_cpp_jobs(config, report)
    shipped = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    packed = report
    if shipped.facts.packed:
        packed = MaskScorer(shipped, report.corpus, context.store)

    def job(
        method: str, name: str, plan: Plan, request: Request, scorer: MaskScorer
    ) -> Job[LadderRow]:
        def measure() -> LadderRow:
            sizes = MemoryModel(scorer.llm).breakdown(plan, request)
            return LadderRow(
                method=method,
                name=name,
                request=request_field(shape),
                held_bytes=sizes.peak - sizes.workspace,
                fits=sizes.peak <= request.budget_bytes,
                levels=plan.levels,
                **delta_nll_fields(scorer.window_nll(plan) - report.window_nll(Plan())),
            )

        shape = request.batch_size, request.seq_len_tokens
        depends_on = {**measured_on(scorer), "plan": plan.levels}
        return Job(LadderRow, (method, name, shape), depends_on, measure)

    methods = {
        "removal": (settings.removing_policy, settings.removal_budgets, report),
        "knapsack": (settings.knapsack, settings.budgets, packed),
    }
    for shape in settings.shapes:
        whole = Request.at_fraction(context.memory, *shape, 1.0)
        for name, plan in uniform_settings(settings, context.memory.facts).items():
            yield job("uniform", name, plan, whole, report)
        for caches in settings.caches if shipped.facts.packed else ():
            plan = Plan.uniform(shipped.facts.num_layers, caches=caches)
            yield job("uniform", f"as shipped / {caches}", plan, whole, packed)
        for method, (policy_name, budgets, scorer) in methods.items():
            if policy := named_policy(policy_name, context, MemoryModel(scorer.llm)):
                for fraction in budgets:
                    request = Request.at_fraction(context.memory, *shape, fraction)
                    plan = policy.choose(request)
                    yield job(method, percent(fraction, 0), plan, request, scorer)


def uniform_settings(settings: LadderConfig, facts: ModelFacts) -> dict[str, Plan]:
    """Plans with one level of weights and one of caches, by name; levels that all blocks have.

    Embeddings with the head are at int8 wherever weights are lowered, if they have that level.
    """
    plans = {}
    for level in (level for level in WEIGHT_LEVELS if level in settings.weights):
        lowered = level != "native"
        if lowered and len(facts.blocks_at(level)) < facts.num_blocks:
            continue
        embeddings: WeightLevel = "native"
        if lowered and "int8" in facts.embedding_levels:
            embeddings = "int8"
        for caches in settings.caches:
            plans[f"{level} / {caches}"] = Plan.uniform(
                facts.num_layers, weights=level, caches=caches, embeddings=embeddings
            )
    return plans


def _llama_cpp_jobs(config: Config, report: MaskScorer) -> Iterator[Job[LadderRow]]:
    """Yield llama.cpp's caches for all requests; `report` scores the unquantised model."""
    file = gguf_file(config.model.name)
    depends_on = {**measured_on(report), "file": file.name, "llama_cpp": need_llama_cpp()}
    windows = report.corpus.tokens.numpy().astype(np.int32)

    @cache
    def delta_nll(cache_type: str) -> dict[str, Any]:
        with closing(LlamaCpp(str(file), cache_type, 1, windows.shape[1], threads=1)) as engine:
            nll = [engine.nll(window) for window in windows]
        return delta_nll_fields(nll - report.window_nll(Plan()))

    def measure(cache_type: str, shape: Shape) -> LadderRow:
        with closing(LlamaCpp(str(file), cache_type, *shape, threads=1)) as engine:
            held_bytes = engine.model_bytes + engine.buffers["KV"]
        request = request_field(shape)
        return LadderRow(
            "llama.cpp", cache_type, held_bytes, request=request, **delta_nll(cache_type)
        )

    for cache_type, shape in product(config.ladder.llama_cpp_caches, config.ladder.shapes):
        identity = "llama.cpp", cache_type, shape
        yield Job(LadderRow, identity, depends_on, partial(measure, cache_type, shape))


def ladder_tables(rows: Sequence[LadderRow]) -> list[TitledTable]:
    """Settings with their bytes for each request; removal beside the knapsack at each budget."""
    by_key = {(row.method, row.name, row.shape): row for row in rows}
    settings = [row for row in rows if row.method in ("uniform", "llama.cpp")]
    budgets = {
        f"{shape_words(row.shape)}, {row.name}": (row.name, row.shape)
        for row in sorted(rows, key=lambda row: row.shape)
        if row not in settings
    }
    shapes = sorted({row.shape for row in rows})

    def mib(shape: Shape, row: LadderRow) -> str:
        return f"{by_key[row.method, row.name, shape].held_bytes / 2**20:,.0f}"

    def at_budget(budget: tuple[str, Shape], method: str) -> str:
        row = by_key.get((method, *budget))
        return "-" if row is None else f"{precise(row.estimate)}{'' if row.fits else ' *'}"

    columns: dict[str, Callable[[LadderRow], str]] = {
        "Weights / caches": _label,
        "ΔNLL": lambda row: precise(row.estimate),
        **{f"{shape_words(shape)}, MiB": partial(mib, shape) for shape in shapes},
    }
    first = [row for row in settings if row.shape == shapes[0]]
    first.sort(key=lambda row: (row.method == "llama.cpp", -row.held_bytes))
    methods = {"Removal alone": "removal", "Knapsack over levels": "knapsack"}
    by_budget = crossed_table("Request, budget", budgets, methods, at_budget)
    return [
        TitledTable(columns_table(first, columns), "Uniform settings", SETTINGS_CAPTION),
        TitledTable(by_budget, "Removal alone, and the ladder", BUDGETS_CAPTION),
    ]


def _label(row: LadderRow) -> str:
    """A setting in words: with the dtype, such as bf16, in the place of ``native``."""
    if row.method == "llama.cpp":
        return f"llama.cpp: {row.name}"
    return row.name.replace("native", str(row.depends_on["dtype"]).replace("bfloat", "bf"))


def loss_against_bytes(rows: Sequence[LadderRow]) -> Figure:
    """ΔNLL over bytes of weights and cache, a panel for each request."""
    panels = [
        Panel(
            partial(_draw, [row for row in rows if row.shape == shape and row.fits]),
            f"{shape_words(shape)} tokens",
            "weights and KV cache (MiB, log scale)",
            "ΔNLL (nats/token)",
        )
        for shape in sorted({row.shape for row in rows})
    ]
    return panel_figure(panels, columns=2, height=3.3, legend=4, same_axes=True, sharey=True)


def _draw(rows: Sequence[LadderRow], axis: Axes) -> None:
    for method, (label, colour, look) in LOOKS.items():
        own = sorted((row for row in rows if row.method == method), key=lambda r: r.held_bytes)
        mebibytes = [row.held_bytes / 2**20 for row in own]
        delta_nll = [row.delta_nll for row in own]
        axis.plot(mebibytes, delta_nll, look, color=colour, markersize=4, label=label)
    scale_delta_nll(axis)
    axis.set_xscale("log")
    plain_log_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7), ",.0f")


STUDY = Study(
    "ladder",
    "The ladder",
    [LadderRow],
    ladder_jobs,
    ladder_tables,
    figures={"ladder": loss_against_bytes},
    frozen=("model", "evaluate.text"),
    published=[Published("ladder", "ladder/ladder", first_section)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
