"""``python -m experiments.ladder.outside``: what others offer for a model, by bytes of weights.

- llama.cpp: files of fewer bits that its quantiser makes from the model's own file, in its engine.
- ShortGPT, ReplaceMe and LinearPatch: layers are left out, and what is left is repaired.
- EoRA: FFN blocks at int2 with a correction of rank 16, which takes the bytes of int3.
- The levels and the knapsack of this package, as they are: the same command adds the rows of a new
  level or plan.

All are compared with the unquantised model at each token of one held-out text, and calibrated on
the text that this package's levels are made with. Bytes are those of the model as shipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from experiments.config import Config
from experiments.config.study_settings import AS_SHIPPED, EMBEDDINGS
from experiments.contexts import build_context, held_out_scorer, named_policy
from experiments.ladder.level_costs_by_model import linear_layers
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp, run_process
from experiments.ladder.loss_against_bytes import (
    KNAPSACK,
    LLAMA,
    REMOVAL,
    UNIFORM,
    nats,
    report_identity,
)
from experiments.ladder.outside_methods import (
    REPLACE_ME,
    DenseStates,
    Fit,
    NativeLogits,
    linear_patch,
    low_rank_corrected,
    replace_me,
    window_logits,
)
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.json_records import DeltaNLLRecord
from experiments.study.plotting import LINEAR_NATS, Panel, draw_label, panel_figure, scale_delta_nll
from experiments.study.run_folder import package_versions
from experiments.study.table_format import TitledTable, columns_table, percent
from rap_env.importance.level_scan import layer_influence
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import shared_llm
from rap_env.models.live.calibration import OWN_TEXT_DAMPING, calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.gptq import hessians
from rap_env.plan import Plan
from rap_env.policies.orders import ascending, whole_layer
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CAPTION = (
    "Bytes of all weights, embeddings included, and the difference from the unquantised model on "
    "the same windows: ΔNLL with a 95 % interval over windows, KL divergence (mean and 99th "
    "percentile over tokens, nats), and the share of tokens at which both find the same token "
    "most likely. `+embeddings`: these have few bits too. Types: matrices in llama.cpp's file."
)
LOOKS = {
    "knapsack": ("knapsack over levels", KNAPSACK, "o"),
    "uniform": ("one level", UNIFORM, "s"),
    "llama.cpp": ("llama.cpp", LLAMA, "D"),
    "ReplaceMe, least squares": ("ReplaceMe (least squares)", "#5B2BE0", "v"),
    "ReplaceMe, cosine": ("ReplaceMe (cosine)", "#9C6ADE", "^"),
    "LinearPatch": ("LinearPatch", "#2B4C9B", "X"),
    "ShortGPT": ("ShortGPT", REMOVAL, "P"),
    "EoRA": ("EoRA", "#8A6D3B", "*"),
}
"""Label, colour and marker of each method of `OutsideRow`."""


@dataclass(frozen=True)
class OutsideRow(DeltaNLLRecord):
    """What a method loses at its bytes of weights, over the unquantised model.

    Attributes:
        method: ``"uniform"`` and ``"knapsack"``, levels of this package; ``"llama.cpp"``;
            ``"ShortGPT"``, ``"LinearPatch"`` or ``"ReplaceMe, OBJECTIVE"``.
        name: The level, the knapsack's budget, the kind of file, or the number of removed layers.
        weight_bytes: Bytes of all weights, embeddings included.
        kl_divergence_mean: As in `rap_env.scoring.interface.NativeAgreement`, from the unquantised
            model.
        kl_divergence_p99: See there.
        same_top_token_share: See there.
        levels: Levels of all items that are not as shipped, by name.
        tensor_types: Number of tensors of each type in llama.cpp's file.
    """

    file = "outside.jsonl"
    record_name = "A record of other methods"
    rerun = "run experiments.ladder.outside again"
    identity = ("method", "name")

    method: str
    name: str
    weight_bytes: int
    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float
    levels: dict[str, str]
    tensor_types: dict[str, int]


class MethodsAtEqualBytes:
    """Measures each method on the held-out text.

    Args:
        config: All settings.

    Attributes:
        context: The context of the unquantised model.
        report: Its scorer on the held-out text.
        memory: Bytes of the model as shipped.
        calibration: Token ids of the calibration text, (windows, T).
    """

    def __init__(self, config: Config) -> None:
        model, self._settings = config.model, config.ladder
        self.context = build_context(config)
        self.report = held_out_scorer(config.evaluate.text, "report", self.context)
        self._packed = shared_llm(
            model.name, device=model.device, dtype=model.dtype, weights="native"
        )
        self.memory = MemoryModel(self._packed)
        self.calibration = calibration_windows(self._packed)
        self._llm = self.context.llm
        self._native = NativeLogits(self._llm, self.report.corpus.tokens)
        self._states = DenseStates(self._llm, self.calibration)

    def measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The fields of a row; the model itself is run first, before a method changes it."""
        self._native.read()
        return measure()

    def own_plans(self) -> dict[tuple[str, str], Plan]:
        """Levels of all blocks or all FFN blocks, and the knapsack's plans, by method and name.

        The plans of the knapsack are for the first request, without what they do to caches.
        """
        facts, plans = self.memory.facts, {("uniform", AS_SHIPPED): Plan()}
        for level in WEIGHT_LEVELS[1:-1]:
            blocks = facts.blocks_at(level)
            if len(blocks) == facts.num_blocks:
                ffn = {name: level for name in blocks if name.endswith("ffn")}
                plans["uniform", f"FFN {level}"] = Plan.of(ffn)
                plans["uniform", level] = Plan.of(blocks)
        knapsack = named_policy(self._settings.knapsack, self.context, self.memory)
        for fraction in sorted(set(self._settings.budgets), reverse=True) if knapsack else ():
            shape = self._settings.shapes[0]
            request = Request.at_fraction(self.context.memory, *shape, fraction)
            chosen = knapsack.choose(request) if knapsack else Plan()
            plan = Plan(chosen.removed, chosen.weights, (), chosen.embeddings)
            if plan not in plans.values():
                plans["knapsack", percent(fraction, 0)] = plan
        return plans

    def own(self, plan: Plan) -> dict[str, Any]:
        """A plan of the model as shipped."""
        return self._fields(self._packed, plan)

    def shortgpt(self, layers: int) -> dict[str, Any]:
        """ShortGPT: without the layers that change the hidden state least."""
        influence = layer_influence(
            self._llm, torch.split(self.calibration.to(self._llm.device), 4)
        )
        removed = ascending(influence)[:layers]
        plan = Plan.removing(*itertools.chain(*map(whole_layer, removed)))
        return self._fields(self._llm, plan)

    def replace_me(self, fit: Fit, layers: int) -> dict[str, Any]:
        """ReplaceMe with one of its objectives."""
        cut = self._states.cut(layers)
        with replace_me(self._llm, self._states, cut, fit):
            return self._fields(self._llm, cut.plan)

    def linear_patch(self, layers: int) -> dict[str, Any]:
        """LinearPatch; its matrix counts."""
        cut = self._states.cut(layers)
        with linear_patch(self._llm, self._states, cut) as added_bytes:
            return self._fields(self._llm, cut.plan, added_bytes)

    def low_rank(self, plan: Plan, rank: int) -> dict[str, Any]:
        """Blocks at the level of a plan with EoRA's correction, which counts."""
        paths = tuple(
            f"{path}."
            for block, _ in plan.weights
            for path in self._llm.adapter.module_paths(block)
        )
        layers = {n: layer for n, layer in linear_layers(self._llm).items() if n.startswith(paths)}
        with low_rank_corrected(layers, self._sums, "int2", rank, OWN_TEXT_DAMPING) as added_bytes:
            return self._fields(self._llm, Plan(), added_bytes, sized=plan)

    def llama_cpp(self, source: Path, kind: str) -> dict[str, Any]:
        """A file that llama.cpp's quantiser makes with an importance matrix, in its engine."""
        windows, file = self._native.windows, self._native.folder / "quantised.gguf"
        logits = self._native.folder / "logits"
        task = {"file": str(source), "cache": "f16", "rows": 1, "tokens": windows.shape[1],
                "threads": 1, "windows": windows.tolist(), "logits": str(logits)}  # fmt: skip
        if kind != AS_SHIPPED:
            task |= {"file": str(file), "quantise": {
                "source": str(source),
                "kind": kind.removesuffix(EMBEDDINGS),
                "embeddings": kind.endswith(EMBEDDINGS),
                "importance": self._importance,
            }}  # fmt: skip
        measured = run_process(task)
        files = (f"{logits}{number}.npy" for number in range(len(windows)))
        compared = self._native.compare(torch.from_numpy(np.load(file)) for file in files)
        types = {"weight_bytes": measured["model_bytes"], "tensor_types": measured["tensor_types"]}
        return {**types, "levels": {}, **compared}

    @cached_property
    def _importance(self) -> dict[str, list[float]]:
        """llama.cpp's importance matrix: the mean square of each matrix's inputs, by tensor."""
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self._llm.facts.num_layers)
        return {
            f"{names.get_name(name)}.weight": (total.diagonal() / self.calibration.numel()).tolist()
            for name, total in self._sums.items()
        }

    @cached_property
    def _sums(self) -> dict[str, torch.Tensor]:
        """Sum of ``x.T x`` of each linear layer's inputs on the calibration text."""
        with hessians(linear_layers(self._llm)) as sums, torch.no_grad(), self._llm.masked(Plan()):
            for window in self.calibration:
                self._llm.hidden(window[None].to(self._llm.device))
        return sums

    def _fields(
        self, llm: ElasticLLM, plan: Plan, added_bytes: int = 0, sized: Plan | None = None
    ) -> dict[str, Any]:
        """The fields of a row; its bytes are those of `sized`, or else of `plan`, and the added."""
        sizes = self.memory.breakdown(sized or plan, Request(1, 1, budget_bytes=2**62))
        logits = (window_logits(llm, plan, window) for window in self._native.windows)
        return {
            "weight_bytes": sizes.weights + sizes.embeddings + added_bytes,
            "tensor_types": {},
            "levels": plan.levels,
            **self._native.compare(logits),
        }


def outside_jobs(config: Config, folder: Path) -> Iterator[Job[OutsideRow]]:
    """Yield the rows of all methods for one model.

    Raises:
        ExperimentError: llama.cpp is not installed, or the model does not come from a GGUF file,
            and ``ladder.llama_cpp_files`` is not empty.
    """
    settings, rows = config.ladder, MethodsAtEqualBytes(config)
    if settings.llama_cpp_files:
        need_llama_cpp()
    text = Corpus.of_tokens(rows.calibration).sha256
    depends_on = {**report_identity(rows.report), "calibration_sha256": text}

    def job(
        method: str, name: str, measure: Callable[[], dict[str, Any]], **more: Any
    ) -> Job[OutsideRow]:
        return Job(
            OutsideRow,
            (method, name),
            {**depends_on, **more},
            lambda: OutsideRow(method=method, name=name, **rows.measured(measure)),
        )

    methods: dict[str, Callable[[int], dict[str, Any]]] = {
        "ShortGPT": rows.shortgpt,
        **{f"ReplaceMe, {name}": partial(rows.replace_me, f) for name, f in REPLACE_ME.items()},
        "LinearPatch": rows.linear_patch,
    }
    for layers, method in itertools.product(settings.removed_layers, methods):
        yield job(method, f"{layers} layers", partial(methods[method], layers))
    own_plans = rows.own_plans()
    for rank in settings.ranks:
        if plan := own_plans.get(("uniform", "FFN int2")):
            yield job("EoRA", f"FFN int2, rank {rank}", partial(rows.low_rank, plan, rank))
    for kind in settings.llama_cpp_files:
        source = gguf_file(config.model.name)
        of_file = partial(rows.llama_cpp, source, kind)
        engine = package_versions([PACKAGE]).get(PACKAGE)
        yield job("llama.cpp", kind, of_file, file=source.name, llama_cpp=engine)
    for (method, name), plan in own_plans.items():
        more = {**rows.memory.facts.identity, "plan": plan.levels}
        yield job(method, name, partial(rows.own, plan), **more)


def outside_tables(rows: Sequence[OutsideRow]) -> list[TitledTable]:
    """A line for each method, the largest first."""
    table = columns_table(
        sorted(rows, key=lambda row: -row.weight_bytes),
        {
            "Method": lambda row: f"{LOOKS[row.method][0]}: {row.name}",
            "MiB": lambda row: f"{row.weight_bytes / 2**20:.1f}",
            "ΔNLL": nats,
            "KL": lambda row: f"{row.kl_divergence_mean:.4f}",
            "KL, 99 %": lambda row: f"{row.kl_divergence_p99:.3f}",
            "Same top token": lambda row: percent(row.same_top_token_share),
            "Types": lambda row: ", ".join(
                f"{count} {kind}" for kind, count in row.tensor_types.items() if kind != "f32"
            ),
        },
    )
    return [TitledTable(table, "What others offer at the same bytes", CAPTION)] if rows else []


def loss_at_equal_bytes(rows: Sequence[OutsideRow]) -> Figure:
    """ΔNLL over bytes of all weights: this package's levels and plans beside what others offer."""
    panel = Panel(partial(_draw, rows), "", "weights (MiB)", "ΔNLL (nats/token)")
    return panel_figure([panel], columns=1, height=4.2, legend=3)


def _draw(rows: Sequence[OutsideRow], axis: Axes) -> None:
    for method, (label, colour, marker) in LOOKS.items():
        own = sorted((row for row in rows if row.method == method), key=lambda r: r.weight_bytes)
        named = method in ("uniform", "llama.cpp")
        axis.plot(
            [row.weight_bytes / 2**20 for row in own], [row.delta_nll for row in own], label=label,
            color=colour, marker=marker, markersize=4.5, linewidth=0 if named else 1.3,
            zorder=6 if named else 4,
        )  # fmt: skip
        for row in own if named else ():
            point = row.weight_bytes / 2**20, row.delta_nll
            ffn = row.name.startswith("FFN")
            left = not ffn and (method == "uniform" or row.name.endswith("embeddings"))
            draw_label(axis, point, row.name, colour, above=ffn, left=left)
    scale_delta_nll(axis)
    axis.set_ylim(-LINEAR_NATS, 2 * max(row.delta_nll for row in rows))


def newest(rows: Sequence[OutsideRow]) -> list[OutsideRow]:
    """The last row of each method and name: later ones are of newer plans."""
    return list({(row.method, row.name): row for row in rows}.values())


STUDY = Study(
    "outside",
    "The ladder",
    [OutsideRow],
    outside_jobs,
    outside_tables,
    data=newest,
    figures={"loss_at_equal_bytes": loss_at_equal_bytes},
    frozen=("model", "evaluate.text"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
