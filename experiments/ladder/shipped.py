"""``python -m experiments.ladder.shipped``: what each level costs one model, by its shipped format.

Four bits are free for a model whose file has four bits. Run this program on models that were
shipped in other formats as well, with one ``name``, so that their rows stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.rows import Ladder, ShippedRow
from experiments.ladder.study import report_identity
from experiments.ladder.tables import ladder_tables
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.records import delta_nll_fields
from rap_env.errors import ArtifactError
from rap_env.levels import WeightLevel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import manifest_source
from rap_env.models.files.sources import locate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.gptq import DampedHessian, hessians, quantise_gptq
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.quantisers import round_to_nearest
from rap_env.models.weights.tensors import read_header
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.scorer import MaskScorer

WEIGHTS: tuple[WeightLevel, ...] = ("int8", "int4", "int4-compact", "int3", "int2")
FFN_LEVELS: tuple[WeightLevel, ...] = ("int3", "int2")
CACHES = ("int8", "int4", "int2")
_QUANTISED_NAME = re.compile(r"(?<![a-z])I?Q\d\w*", re.IGNORECASE)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Lowering(NamedTuple):
    """One level everywhere: of ``"weights"``, ``"FFN"``, ``"embeddings"`` or ``"caches"``."""

    what: str
    level: str
    rounding: str
    plan: Plan


def shipped_jobs(config: Config, folder: Path) -> Iterator[Job[ShippedRow]]:
    """Yield the levels of one model; rows of other models in the file stay.

    Windows begin with the start token if the model's tokenizer adds one, as it was trained.
    """
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    windows = with_start(context.llm, report.corpus.tokens)
    if windows is not report.corpus.tokens:
        report = MaskScorer(context.llm, Corpus.of_tokens(windows))
    calibration = with_start(context.llm, context.corpus.tokens)
    source = Path(config.model.name).name, shipped_format(config.model.name)
    text = Path(config.evaluate.text.source).parent.name or "self"
    request = Request(1, report.corpus.tokens.shape[1], budget_bytes=2**62)
    for lowering in lowerings(context.memory.facts):
        what, level, rounding, plan = lowering
        sizes = context.memory.breakdown(plan, request)
        named = {"model": source[0], "shipped": source[1], "text": text}
        size = {
            "weights": sizes.weights, "FFN": sizes.ffn_weights, "embeddings": sizes.embeddings
        }.get(what, 0)  # fmt: skip
        yield Job(
            ShippedRow,
            (source[0], what, level, rounding, text),
            report_identity(report),
            partial(_row, config, lowering, report, calibration, {**named, "lowered_bytes": size}),
        )


def with_start(llm: ElasticLLM, tokens: torch.Tensor) -> torch.Tensor:
    """Windows behind the start token, if the model's tokenizer adds one; the last token goes."""
    if llm.tokenizer is None or llm.tokenizer("a")["input_ids"][0] != llm.tokenizer.bos_token_id:
        return tokens
    start = torch.full((len(tokens), 1), llm.tokenizer.bos_token_id)
    return torch.cat((start, tokens[:, :-1]), dim=1)


def lowerings(facts: ModelFacts) -> Iterator[Lowering]:
    """Yield every level of all weights, of the embeddings, and of all caches that exists."""
    for level in WEIGHTS:
        blocks = facts.blocks_at(level)
        roundings = ("nearest", "calibrated", "fitted") if level == "int4" else ("fitted",)
        for rounding in roundings if blocks else ():
            yield Lowering("weights", level, rounding, Plan.of(blocks))
        ffn = {name: level for name in blocks if name.endswith(".ffn")}
        if ffn and level in FFN_LEVELS:
            yield Lowering("FFN", level, "fitted", Plan.of(ffn))
    for level in WEIGHTS:
        if level in facts.embedding_levels:
            yield Lowering("embeddings", level, "fitted", Plan(embeddings=level))
    for cache in CACHES if facts.kv_heads else ():
        yield Lowering("caches", cache, "", Plan.uniform(facts.num_layers, caches=cache))


def _row(
    config: Config,
    lowering: Lowering,
    report: MaskScorer,
    calibration: torch.Tensor,
    fields: dict[str, Any],
    provenance: dict[str, Any],
) -> ShippedRow:
    what, level, rounding, plan = lowering
    if rounding in ("nearest", "calibrated"):
        nll = rounded_nll(config, rounding, report.corpus, calibration)
    else:
        nll = report.window_nll(plan)
    return ShippedRow(
        **fields,
        what=what,
        level=level,
        rounding=rounding,
        **delta_nll_fields(nll - report.window_nll(Plan())),
        provenance=provenance,
    )


def rounded_nll(
    config: Config, rounding: str, text: Corpus, calibration: torch.Tensor
) -> npt.NDArray[np.float64]:
    """NLL of each window with all matrices of blocks at int4, on a copy of the model."""
    model = config.model
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    layers = linear_layers(llm)
    with hessians(layers) as sums, torch.no_grad():
        for window in calibration if rounding == "calibrated" else ():
            llm.model(input_ids=window[None].to(llm.device), use_cache=False)
    packed: PackedMatrix
    with torch.no_grad():
        for name, layer in layers.items():
            if rounding == "nearest":
                packed = round_to_nearest(layer.weight)
            else:
                packed = quantise_gptq(layer.weight, "int4", DampedHessian.of(sums[name]))
            layer.weight.copy_(packed.widened(layer.weight.dtype))
    return MaskScorer(llm, text).window_nll(Plan())


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


STUDY = Study(
    "shipped",
    "The ladder",
    [ShippedRow],
    shipped_jobs,
    ladder_tables,
    data=Ladder.of,
    frozen=("evaluate.text",),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
