"""``python -m experiments.ladder.level_costs_by_model``: what each level costs which model.

Four bits are free for a model whose file has four bits. Run this program on models that were
shipped in other formats as well, with one ``name``, so that their rows stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.loss_against_bytes import nats, report_identity
from experiments.launch import launch
from experiments.study.harness import Job, Study
from experiments.study.json_records import DeltaNLLRecord, delta_nll_fields
from experiments.study.table_format import TitledTable, columns_table
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
CAPTION = (
    "MiB of the weights that were lowered, and ΔNLL over the model as its file has it, nats per "
    "token with a 95 % interval over windows, of one level for the weights of all blocks or of "
    "their FFN, for embeddings with the head, or for all caches; in brackets the file's format. "
    "A file with four bits loses nothing at four; that says little about models shipped in more."
)
_ROUNDINGS = {"nearest": ", rounded to nearest", "calibrated": ", GPTQ on calibration text"}
_QUANTISED_NAME = re.compile(r"(?<![a-z])I?Q\d\w*", re.IGNORECASE)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Lowered = tuple[str, str, str]
"""What is lowered (`LevelCostRow.what`), to which level, and how weights are rounded."""


@dataclass(frozen=True)
class LevelCostRow(DeltaNLLRecord):
    """What one level costs one model; ΔNLL is over the model as its file has it.

    Attributes:
        model: The model's name.
        shipped_format: Format of its weights as shipped, such as ``"Q4_1"`` or ``"bfloat16"``.
        what: What was lowered: ``"weights"`` (of all blocks), ``"FFN"``, ``"embeddings"`` or
            ``"caches"``.
        level: To which level.
        rounding: How weights were quantised: ``"fitted"`` (least error, as the model does it),
            ``"nearest"``, or ``"calibrated"`` (GPTQ on the calibration text); empty for caches.
        text: Name of the report text.
        lowered_bytes: Bytes of the weights that were lowered; 0 for caches.
    """

    file = "level_costs_by_model.jsonl"
    record_name = "A record of a model's levels"
    rerun = "run experiments.ladder.level_costs_by_model again"
    identity = ("model", "what", "level", "rounding", "text")

    model: str
    shipped_format: str
    what: str
    level: str
    rounding: str
    text: str
    lowered_bytes: int

    @property
    def source(self) -> tuple[str, str]:
        """Model, and the format that it was shipped in."""
        return self.model, self.shipped_format

    @property
    def lowered(self) -> Lowered:
        """What was lowered, to which level, and how weights were rounded."""
        return self.what, self.level, self.rounding


def level_cost_jobs(config: Config, folder: Path) -> Iterator[Job[LevelCostRow]]:
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
    for lowered, plan in lowered_everywhere(context.memory.facts):
        what, level, rounding = lowered
        sizes = context.memory.breakdown(plan, request)
        size = {
            "weights": sizes.weights, "FFN": sizes.ffn_weights, "embeddings": sizes.embeddings
        }.get(what, 0)  # fmt: skip
        yield Job(
            LevelCostRow,
            (source[0], what, level, rounding, text),
            report_identity(report),
            partial(
                _row, config, plan, report, calibration,
                model=source[0], shipped_format=source[1], what=what, level=level,
                rounding=rounding, text=text, lowered_bytes=size,
            ),
        )  # fmt: skip


def with_start(llm: ElasticLLM, tokens: torch.Tensor) -> torch.Tensor:
    """Windows behind the start token, if the model's tokenizer adds one; the last token goes."""
    if llm.tokenizer is None or llm.tokenizer("a")["input_ids"][0] != llm.tokenizer.bos_token_id:
        return tokens
    start = torch.full((len(tokens), 1), llm.tokenizer.bos_token_id)
    return torch.cat((start, tokens[:, :-1]), dim=1)


def lowered_everywhere(facts: ModelFacts) -> Iterator[tuple[Lowered, Plan]]:
    """Yield every level of all weights, of the embeddings, and of all caches that exists."""
    for level in WEIGHTS:
        blocks = facts.blocks_at(level)
        roundings = ("nearest", "calibrated", "fitted") if level == "int4" else ("fitted",)
        for rounding in roundings if blocks else ():
            yield ("weights", level, rounding), Plan.of(blocks)
        ffn = {name: level for name in blocks if name.endswith(".ffn")}
        if ffn and level in FFN_LEVELS:
            yield ("FFN", level, "fitted"), Plan.of(ffn)
    for level in WEIGHTS:
        if level in facts.embedding_levels:
            yield ("embeddings", level, "fitted"), Plan(embeddings=level)
    for cache in CACHES if facts.kv_heads else ():
        yield ("caches", cache, ""), Plan.uniform(facts.num_layers, caches=cache)


def _row(
    config: Config, plan: Plan, report: MaskScorer, calibration: torch.Tensor, **fields: Any
) -> LevelCostRow:
    if fields["rounding"] in ("nearest", "calibrated"):
        nll = rounded_nll(config, fields["rounding"], report.corpus, calibration)
    else:
        nll = report.window_nll(plan)
    return LevelCostRow(**fields, **delta_nll_fields(nll - report.window_nll(Plan())))


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


def level_cost_tables(rows: list[LevelCostRow]) -> list[TitledTable]:
    """Bytes and ΔNLL of each level everywhere, for each model."""
    columns: dict[str, Callable[[Lowered], str]] = {
        "Lowered everywhere": lambda key: f"{key[0]} {key[1]}{_ROUNDINGS.get(key[2], '')}"
    }
    for model, shipped_format in dict.fromkeys(row.source for row in rows):
        own = {row.lowered: row for row in rows if row.source == (model, shipped_format)}
        columns[f"{model} ({shipped_format}), MiB"] = partial(_mebibytes, own)
        columns[f"{model}, ΔNLL"] = partial(_delta_nll, own)
    table = columns_table(dict.fromkeys(row.lowered for row in rows), columns)
    return [TitledTable(table, "One level everywhere, in two models", CAPTION)] if rows else []


def _mebibytes(rows: Mapping[Lowered, LevelCostRow], lowered: Lowered) -> str:
    row = rows.get(lowered)
    return f"{row.lowered_bytes / 2**20:.1f}" if row and row.lowered_bytes else "-"


def _delta_nll(rows: Mapping[Lowered, LevelCostRow], lowered: Lowered) -> str:
    return nats(rows[lowered]) if lowered in rows else "-"


STUDY = Study(
    "level_costs_by_model",
    "The ladder",
    [LevelCostRow],
    level_cost_jobs,
    level_cost_tables,
    frozen=("evaluate.text",),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
