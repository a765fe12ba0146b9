"""``python -m experiments.ladder.shipped``: what each level costs one model, by its shipped format.

Four bits are free for a model whose file has four bits. Run this program on models that were
shipped in other formats as well, with one ``name``, so that their rows stand in one table.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.config import Config
from experiments.console import say
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.program import report_identity
from experiments.ladder.records import SHIPPED_FILE, ShippedRow
from experiments.ladder.summaries import LadderRecords
from experiments.ladder.tables import publish
from experiments.launch import launch
from experiments.study.records import RowFile, delta_nll_fields, row_key
from experiments.study.run_folder import RunFolder, git_state
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.errors import ArtifactError
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import manifest_source
from rap_env.models.files.sources import locate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.progress import progress_bar
from rap_env.models.weights.gptq import HessianCollector, quantise_gptq
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import round_to_nearest
from rap_env.models.weights.tensors import read_header
from rap_env.plan import CompressionPlan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer

WEIGHTS: tuple[WeightLevel, ...] = ("int8", "int4")
CACHES = ("int8", "int4", "int2")
_FROZEN = ("evaluate.text",)
_QUANTISED_NAME = re.compile(r"(?<![a-z])I?Q\d\w*", re.IGNORECASE)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Lowering:
    """One level everywhere.

    Attributes:
        what: ``"weights"``, ``"embeddings"`` or ``"caches"``.
        rounding: How weights are quantised; see `ShippedRow`.
    """

    what: str
    level: str
    plan: CompressionPlan
    rounding: str = ""


def shipped(config: Config, folder: Path) -> Path:
    """Measure the levels of one model; rows of other models in the file stay.

    Returns:
        The path of ``shipped.jsonl``.
    """
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    file = RowFile(folder / SHIPPED_FILE, ShippedRow)
    how, text = shipped_format(config.model.name), Path(config.evaluate.text.source).parent.name
    provenance = {"depends_on": report_identity(report), "git": git_state()}
    name = Path(config.model.name).name
    rounded = RoundedModel(config, context, report)
    found = list(lowerings(context))
    for lowering in progress_bar(config.progress, found, desc="shipped", unit="level"):
        identity = (name, lowering.what, lowering.level, lowering.rounding, text or "self")
        file.get(
            row_key(*identity, provenance),
            partial(_row, lowering, rounded, identity, how, provenance),
        )
    rows = ShippedRow.read(folder / SHIPPED_FILE)
    run.finish(started, rows=len(rows))
    publish(folder, LadderRecords(shipped=rows))
    say(f"{len(rows)} records in {folder / SHIPPED_FILE}.")
    return folder / SHIPPED_FILE


def lowerings(context: PruningContext) -> Iterator[Lowering]:
    """Yield every level of all weights, of the embeddings, and of all caches that exists."""
    facts = context.memory.facts
    for level in WEIGHTS:
        having = [i for i in range(facts.num_blocks) if level in facts.weight_levels(i)]
        plan = CompressionPlan(weights=tuple((index, level) for index in having))
        if not having:
            continue
        if level == "int4":
            yield Lowering("weights", level, plan, "nearest")
            yield Lowering("weights", level, plan, "calibrated")
        yield Lowering("weights", level, plan, "fitted")
    for level in WEIGHTS:
        if level in facts.embedding_levels:
            yield Lowering("embeddings", level, CompressionPlan(embeddings=level), "fitted")
    for cache in CACHES if facts.kv_heads else ():
        plan = CompressionPlan.uniform(facts.num_layers, caches=cache)
        yield Lowering("caches", cache, plan)


class RoundedModel:
    """Scores lowered weights and caches, and weights that other quantisers rounded.

    Args:
        config: All settings.
        context: The context of the unquantised model.
        report: Its scorer on the report text.
    """

    def __init__(self, config: Config, context: PruningContext, report: MaskScorer) -> None:
        self.context, self.report = context, report
        self._model = config.model

    def delta_nll(self, lowering: Lowering) -> npt.NDArray[np.float64]:
        """ΔNLL on each window, (windows,)."""
        native = self.report.window_nll(BlockMask())
        if lowering.rounding in ("nearest", "calibrated"):
            return self._rounded(lowering.rounding) - native
        return self.report.window_nll(lowering.plan) - native

    def _rounded(self, rounding: str) -> npt.NDArray[np.float64]:
        """NLL with all matrices of blocks at int4, on a copy of the model."""
        llm = load_llm(
            self._model.name,
            device=self._model.device,
            dtype=self._model.dtype,
            weights=self._model.weights,
        )
        layers = linear_layers(llm)
        quantise: Callable[[str, torch.Tensor], PackedMatrix]
        if rounding == "nearest":
            quantise = partial(_nearest)
        else:
            with HessianCollector(layers) as sums, torch.no_grad():
                for window in self.context.corpus.tokens:
                    llm.model(input_ids=window[None].to(llm.device), use_cache=False)
            quantise = partial(_calibrated, sums)
        with torch.no_grad():
            for name, layer in layers.items():
                packed = quantise(name, layer.weight)
                layer.weight.copy_(packed.widened(layer.weight.dtype))
        return MaskScorer(llm, self.report.corpus).window_nll(BlockMask())


def _nearest(_name: str, weight: torch.Tensor) -> PackedMatrix:
    return round_to_nearest(weight, "int4")


def _calibrated(sums: HessianCollector, name: str, weight: torch.Tensor) -> PackedMatrix:
    return quantise_gptq(weight, sums[name])


def linear_layers(llm: ElasticLLM) -> dict[str, torch.nn.Linear]:
    """The linear layers of all blocks, by their names in the model."""
    outside = {id(llm.model.get_input_embeddings()), id(llm.model.get_output_embeddings())}
    return {
        name: module
        for name, module in llm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in outside
    }


def shipped_format(model: str) -> str:
    """Format of a model's weights as shipped: a quantised type of a GGUF file, or a dtype."""
    folder = locate(model).folder
    try:
        named = _QUANTISED_NAME.search(Path(str(manifest_source(folder)["file"])).stem)
    except (OSError, KeyError, ArtifactError):
        named = None
    if named:
        return named[0].upper()
    files = sorted(folder.glob("*.safetensors"))
    kinds = [entry["dtype"] for file in files for entry in read_header(file).values()]
    return _DTYPES.get(max(kinds, key=kinds.count), "unknown") if kinds else "unknown"


def _row(
    lowering: Lowering,
    model: RoundedModel,
    identity: tuple[str, str, str, str, str],
    how: str,
    provenance: dict[str, Any],
) -> ShippedRow:
    name, what, level, rounding, text = identity
    return ShippedRow(
        model=name,
        shipped=how,
        what=what,
        level=level,
        rounding=rounding,
        saved=saved_share(model.context.memory, lowering),
        text=text,
        window_tokens=int(model.report.corpus.tokens.shape[1]),
        **delta_nll_fields(model.delta_nll(lowering)),
        provenance=provenance,
    )


def saved_share(memory: MemoryModel, lowering: Lowering) -> float:
    """Share of the bytes of what is lowered that the level saves; caches at 1,024 tokens."""
    tokens = min(1024, memory.facts.max_positions)
    request = Request(1, tokens, budget_bytes=2**62)
    part = {"weights": "weights", "embeddings": "embeddings", "caches": "kv_cache"}[lowering.what]
    before, after = (
        memory.breakdown(plan, request).as_dict()[f"{part}_bytes"]
        for plan in (CompressionPlan(), lowering.plan)
    )
    return 1 - after / before


if __name__ == "__main__":
    launch("shipped", shipped)
