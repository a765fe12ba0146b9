"""``python -m experiments.studies.ladder``: loss against bytes of uniform settings.

Beside them stand the formats of llama.cpp's cache, on the same file and windows of token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer, measured_on
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
from experiments.study.table_format import TitledTable, columns_table, precise, shape_words
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import shared_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import PlanScorer

WEIGHTS: tuple[WeightLevel, ...] = ("native", "int8", "int4")
CACHES = ("native", "int8", "int4", "int2", "window512")
"""Levels of all weights and of all caches in uniform settings."""
CAPTION = (
    "One level for all weights and one for all caches (embeddings with the head at int8 where "
    "weights are lowered), and llama.cpp's caches on the same file and windows. ΔNLL over "
    "unquantised weights and caches, nats per token with a 95 % interval over windows; MiB of "
    "weights and KV cache for each request (batch x tokens)."
)


@dataclass(frozen=True)
class LadderRow(RequestRecord, DeltaNLLRecord):
    """One plan, or one format of llama.cpp's cache, under one request.

    ΔNLL is over the unquantised model.

    Attributes:
        method: ``"uniform"`` (one level for all weights and one for all caches) or
            ``"llama.cpp"``.
        name: The setting, such as ``"int4 / int8"`` (weights / caches) or ``"q8_0"``.
        held_bytes: Bytes of weights and KV cache, as llama.cpp allocates them or as computed.
    """

    file = "ladder.jsonl"
    identity = ("method", "name", "shape")

    method: str
    name: str
    held_bytes: int


def ladder_jobs(config: Config, folder: Path) -> Iterator[Job[LadderRow]]:
    """Yield the uniform settings, and llama.cpp's caches, for all requests.

    Caches are lowered in the model as shipped too, if its weights are packed.

    Raises:
        InvalidRequestError: The model cannot serve a request.
        ExperimentError: ``ladder.llama_cpp_caches`` has entries, but llama.cpp is not
            installed, or the model comes from no GGUF file.
    """
    model, context = config.model, build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    if config.ladder.llama_cpp_caches:
        yield from _llama_cpp_jobs(config, report)

    def measured(name: str, plan: Plan, shape: Shape, scorer: PlanScorer) -> LadderRow:
        request = Request(*shape, budget_bytes=2**62)
        sizes = MemoryModel(scorer.llm).breakdown(plan, request)
        return LadderRow(
            method="uniform",
            name=name,
            request=request_field(shape),
            held_bytes=sizes.peak - sizes.workspace,
            **delta_nll_fields(scorer.window_nll(plan) - report.window_nll(Plan())),
        )

    settings = [(name, plan, report) for name, plan in uniform_settings(report.llm.facts).items()]
    shipped = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    if shipped.facts.packed:
        packed = PlanScorer(shipped, report.corpus, context.store)
        for caches in CACHES:
            plan = Plan.uniform(shipped.facts.num_layers, caches=caches)
            settings.append((f"as shipped / {caches}", plan, packed))
    for shape, (name, plan, scorer) in product(config.ladder.shapes, settings):
        context.memory.check(*shape)
        depends_on = {**measured_on(scorer), "plan": plan.levels}
        make = partial(measured, name, plan, shape, scorer)
        yield Job(LadderRow, ("uniform", name, shape), depends_on, make)


def uniform_settings(facts: ModelFacts) -> dict[str, Plan]:
    """Plans with one level of weights and one of caches, by name; levels that all blocks have.

    Embeddings with the head are at int8 wherever weights are lowered, if they have that
    level.
    """
    plans = {}
    for level in WEIGHTS:
        lowered = level != "native"
        if lowered and len(facts.blocks_at(level)) < facts.num_blocks:
            continue
        embeddings: WeightLevel = "native"
        if lowered and "int8" in facts.embedding_levels:
            embeddings = "int8"
        for caches in CACHES:
            plans[f"{level} / {caches}"] = Plan.uniform(
                facts.num_layers, weights=level, caches=caches, embeddings=embeddings
            )
    return plans


def _llama_cpp_jobs(config: Config, report: PlanScorer) -> Iterator[Job[LadderRow]]:
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
        return LadderRow(
            method="llama.cpp",
            name=cache_type,
            request=request_field(shape),
            held_bytes=held_bytes,
            **delta_nll(cache_type),
        )

    for cache_type, shape in product(config.ladder.llama_cpp_caches, config.ladder.shapes):
        identity = "llama.cpp", cache_type, shape
        yield Job(LadderRow, identity, depends_on, partial(measure, cache_type, shape))


def ladder_tables(rows: Sequence[LadderRow]) -> list[TitledTable]:
    """Settings with their bytes for each request."""
    held_bytes = {(row.method, row.name, row.shape): row.held_bytes for row in rows}
    shapes = sorted({row.shape for row in rows})

    def mib(shape: Shape, row: LadderRow) -> str:
        return f"{held_bytes[row.method, row.name, shape] / 2**20:,.0f}"

    columns: dict[str, Callable[[LadderRow], str]] = {
        "Weights / caches": _label,
        "ΔNLL": lambda row: precise(row.estimate),
        **{f"{shape_words(shape)}, MiB": partial(mib, shape) for shape in shapes},
    }
    first = [row for row in rows if row.shape == shapes[0]]
    first.sort(key=lambda row: (row.method == "llama.cpp", -row.held_bytes))
    return [TitledTable(columns_table(first, columns), "Uniform settings", CAPTION)]


def _label(row: LadderRow) -> str:
    """A setting in words: with the dtype, such as bf16, in the place of ``native``."""
    if row.method == "llama.cpp":
        return f"llama.cpp: {row.name}"
    return row.name.replace("native", str(row.depends_on["dtype"]).replace("bfloat", "bf"))


STUDY = Study(
    "ladder",
    "The ladder",
    [LadderRow],
    ladder_jobs,
    ladder_tables,
    frozen=("model", "evaluate.text"),
    published=[Published("ladder", "ladder/ladder", first_section)],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
