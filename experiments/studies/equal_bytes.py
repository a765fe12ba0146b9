"""``python -m experiments.studies.equal_bytes``: levels and llama.cpp's files by bytes of weights.

The levels and the knapsack of this package stand beside files of fewer bits that llama.cpp's
quantiser makes from the model's own file, in its engine. All are compared with the
unquantised model at each token of one held-out text, and calibrated on the text that this
package's levels are made with. Bytes are those of the model as shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch

from experiments.config import Config
from experiments.config.common import parse_shape
from experiments.contexts import build_context, held_out_scorer, measured_on, named_policy
from experiments.launch import launch
from experiments.llama_cpp import (
    AS_SHIPPED,
    LlamaCpp,
    gguf_file,
    need_llama_cpp,
    write_quantised_file,
)
from experiments.study.harness import DeltaNLLRecord, Job, Study
from experiments.study.logits import compared, logits_of, window_logits
from experiments.study.table_format import TitledTable, columns_table, percent, precise
from rap_env.context.base import PruningContext
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import shared_llm
from rap_env.models.live.calibration_text import calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.gptq import hessians
from rap_env.plan import Plan
from rap_env.request import Request

CAPTION = (
    "Bytes of all weights, embeddings included, and the difference from the unquantised model on "
    "the same windows: ΔNLL with a 95 % interval over windows, KL divergence (mean and 99th "
    "percentile over tokens, nats), and the share of tokens at which both find the same token "
    "most likely. `+embeddings`: these have few bits too. Types: matrices in llama.cpp's file."
)
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
"""Budgets of the knapsack, as fractions of the unquantised model's peak bytes."""
LABELS = {"uniform": "one level", "knapsack": "knapsack over levels", "llama.cpp": "llama.cpp"}
"""What the table calls each method of `EqualBytesRow`."""


@dataclass(frozen=True)
class EqualBytesRow(DeltaNLLRecord):
    """What a method loses at its bytes of weights, over the unquantised model.

    Attributes:
        method: ``"uniform"`` and ``"knapsack"``, levels of this package; ``"llama.cpp"``.
        name: The level, the knapsack's budget, or the kind of file.
        weight_bytes: Bytes of all weights, embeddings included.
        kl_divergence_mean: As in `rap_env.scoring.native_agreement.NativeAgreement`, from the
            unquantised model.
        kl_divergence_p99: See there.
        same_top_token_share: See there.
        levels: Levels of all items that are not as shipped, by name.
        tensor_types: Number of tensors of each type in llama.cpp's file.
    """

    file = "equal_bytes.jsonl"
    identity = ("method", "name")

    method: str
    name: str
    weight_bytes: int
    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float
    levels: dict[str, str] = field(default_factory=dict)
    tensor_types: dict[str, int] = field(default_factory=dict)


def equal_bytes_jobs(config: Config, folder: Path) -> Iterator[Job[EqualBytesRow]]:
    """Yield the rows of all methods for one model.

    Raises:
        ExperimentError: ``equal_bytes.llama_cpp_files`` has entries, but llama.cpp is not
            installed, or the model comes from no GGUF file.
    """
    settings, model = config.equal_bytes, config.model
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    shipped = shared_llm(model.name, device=model.device, dtype=model.dtype, weights="native")
    memory = MemoryModel(shipped)

    def compare(logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        windows = report.corpus.tokens
        # The unquantised model runs again for each row: its logits of all windows take gigabytes.
        native = map(partial(window_logits, context.llm, Plan()), windows)
        return compared(native, windows, logits)

    def measure_plan(method: str, name: str, plan: Plan) -> EqualBytesRow:
        sizes = memory.breakdown(plan, Request(1, 1, budget_bytes=2**62))
        return EqualBytesRow(
            method=method,
            name=name,
            weight_bytes=sizes.weights + sizes.embeddings,
            levels=plan.levels,
            **compare(partial(window_logits, shipped, plan)),
        )

    def measure_file(source: Path, kind: str) -> EqualBytesRow:
        tokens = report.corpus.tokens.shape[1]
        with TemporaryDirectory() as folder:
            file = source
            if kind != AS_SHIPPED:
                file = Path(folder, "quantised.gguf")
                squares = input_squares(context.llm, calibration_windows(shipped))
                write_quantised_file(source, file, kind, squares)
            with closing(LlamaCpp(str(file), "f16", 1, tokens, threads=1)) as engine:
                return EqualBytesRow(
                    method="llama.cpp",
                    name=kind,
                    weight_bytes=engine.model_bytes,
                    tensor_types=engine.tensor_types,
                    **compare(partial(logits_of, engine)),
                )

    depends_on = measured_on(report)
    for kind in settings.llama_cpp_files:
        source = gguf_file(model.name)
        of_file = {**depends_on, "file": source.name, "llama_cpp": need_llama_cpp()}
        make = partial(measure_file, source, kind)
        yield Job(EqualBytesRow, ("llama.cpp", kind), of_file, make)
    for identity, plan in own_plans(config, context, memory).items():
        of_plan = {**depends_on, **memory.facts.identity, "plan": plan.levels}
        yield Job(EqualBytesRow, identity, of_plan, partial(measure_plan, *identity, plan))


def own_plans(
    config: Config, context: PruningContext, memory: MemoryModel
) -> dict[tuple[str, str], Plan]:
    """Levels of all blocks or all FFN blocks, and the knapsack's plans, by method and name.

    The plans of the knapsack are for the first request, without what they do to caches.
    """
    facts, plans = memory.facts, {("uniform", AS_SHIPPED): Plan()}
    for level in WEIGHT_LEVELS[1:-1]:
        blocks = facts.blocks_at(level)
        if len(blocks) == facts.num_blocks:
            ffn = {name: level for name in blocks if name.endswith("ffn")}
            plans["uniform", f"FFN {level}"] = Plan.of(ffn)
            plans["uniform", level] = Plan.of(blocks)
    knapsack = named_policy(config.equal_bytes.knapsack, context, memory)
    if knapsack is None or knapsack.level_costs is None:  # the rule without costs
        return plans
    shape = parse_shape(config.equal_bytes.request)
    for fraction in BUDGETS:
        request = Request.at_fraction(context.memory, *shape, fraction)
        chosen = knapsack.choose(request)
        plan = Plan(chosen.removed, chosen.weights, (), chosen.embeddings)
        if plan not in plans.values():
            plans["knapsack", percent(fraction, 0)] = plan
    return plans


def input_squares(llm: ElasticLLM, text: torch.Tensor) -> dict[str, list[float]]:
    """llama.cpp's importance matrix: the mean square of each matrix's inputs, by tensor."""
    modules = llm.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}
    with hessians(layers) as sums, torch.no_grad(), llm.applied(Plan()):
        for window in text:
            llm.hidden(window[None].to(llm.device))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, llm.facts.num_layers)
    return {
        f"{names.get_name(name)}.weight": (total.diagonal() / text.numel()).tolist()
        for name, total in sums.items()
    }


def equal_bytes_tables(rows: Sequence[EqualBytesRow]) -> list[TitledTable]:
    """A line for each method, the largest first."""
    table = columns_table(
        sorted(rows, key=lambda row: -row.weight_bytes),
        {
            "Method": lambda row: f"{LABELS[row.method]}: {row.name}",
            "MiB": lambda row: f"{row.weight_bytes / 2**20:.1f}",
            "ΔNLL": lambda row: precise(row.estimate),
            "KL": lambda row: f"{row.kl_divergence_mean:.4f}",
            "KL, 99 %": lambda row: f"{row.kl_divergence_p99:.3f}",
            "Same top token": lambda row: percent(row.same_top_token_share),
            "Types": lambda row: ", ".join(
                f"{count} {kind}" for kind, count in row.tensor_types.items() if kind != "f32"
            ),
        },
    )
    return [TitledTable(table, "What llama.cpp offers at the same bytes", CAPTION)]


STUDY = Study(
    "equal_bytes",
    "The ladder",
    [EqualBytesRow],
    equal_bytes_jobs,
    equal_bytes_tables,
    frozen=("model", "evaluate.text"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
