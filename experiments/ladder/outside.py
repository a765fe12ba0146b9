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
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from experiments.config import Config
from experiments.config.studies import AS_SHIPPED, EMBEDDINGS
from experiments.contexts import build_context, held_out_scorer, named_policy
from experiments.ladder.llama_cpp import PACKAGE, gguf_file, need_llama_cpp, run_process
from experiments.ladder.outside_methods import (
    REPLACE_ME,
    DenseStates,
    Fit,
    linear_patch,
    low_rank_corrected,
    replace_me,
)
from experiments.ladder.rows import Ladder, OutsideRow
from experiments.ladder.shipped import linear_layers
from experiments.ladder.study import report_identity
from experiments.ladder.tables import ladder_tables, loss_at_equal_bytes
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.records import delta_nll_fields
from experiments.study.run_folder import package_versions
from experiments.study.tables import percent
from rap_env.importance.one_shot_scores import layer_influence
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import shared_llm
from rap_env.models.live.calibration import OWN_TEXT_DAMPING, calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.gptq import hessians
from rap_env.plan import Plan
from rap_env.policies.orders import ascending, whole_layer
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.native_agreement import TokenComparison, agreement_of
from rap_env.scoring.nll import HEAD_TOKENS, token_nll


@torch.inference_mode()
def window_logits(llm: ElasticLLM, plan: Plan, window: torch.Tensor) -> torch.Tensor:
    """Logits of a window's positions but the last, in the model's dtype: (T,) to (T - 1, V)."""
    forward = PartialForward(llm, widen=True)
    with llm.masked(plan):
        hidden = forward.hidden(window[None].to(llm.device))[0, :-1]
        return torch.cat([forward.logits(part) for part in torch.split(hidden, HEAD_TOKENS)]).cpu()


class NativeLogits:
    """The unquantised model's logits on the held-out text, with which all others are compared.

    Args:
        llm: The model.
        windows: Token ids, (windows, T).

    Attributes:
        windows: The same.
        folder: A folder that is removed with this object.
    """

    def __init__(self, llm: ElasticLLM, windows: torch.Tensor) -> None:
        self._llm, self.windows = llm, windows
        self._folder = tempfile.TemporaryDirectory(prefix="rap-outside-")
        self.folder = Path(self._folder.name)
        self._logits = torch.empty(0)  # then in a file, (windows, T - 1, V)

    def read(self) -> None:
        """Run the model, which must be as it is, unless that was done."""
        if len(self._logits):
            return
        windows, tokens = self.windows.shape
        shape = windows, tokens - 1, self._llm.facts.vocab_size
        file, dtype = str(self.folder / "native.bin"), self._llm.dtype
        logits = torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for number, window in enumerate(self.windows):
            logits[number] = window_logits(self._llm, Plan(), window)
        self._logits = logits

    def compare(self, logits: Iterable[torch.Tensor]) -> dict[str, Any]:
        """The fields of a row from a method's logits of each window, each (T - 1, V)."""
        delta_nll, tokens = [], []
        for window, native, own in zip(self.windows, self._logits, logits, strict=True):
            nll, native_nll = (token_nll(part, window[1:]).mean() for part in (own, native))
            delta_nll.append(float(nll - native_nll))
            comparison = TokenComparison(native, [Plan()])
            comparison.add(own)
            tokens.append(comparison.by_plan()[Plan()])
        agreement = agreement_of(np.concatenate(tokens, axis=1))
        return {**delta_nll_fields(delta_nll), **asdict(agreement)}


class Contenders:
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
            "weight_bytes": sizes.weights + sizes.stubs + sizes.embeddings + added_bytes,
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
    settings, rows = config.ladder, Contenders(config)
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
            lambda provenance: OutsideRow(
                method=method, name=name, **rows.measured(measure), provenance=provenance
            ),
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


STUDY = Study(
    "outside",
    "The ladder",
    [OutsideRow],
    outside_jobs,
    ladder_tables,
    data=Ladder.of,
    figures={"loss_at_equal_bytes": loss_at_equal_bytes},
    frozen=("model", "evaluate.text"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
