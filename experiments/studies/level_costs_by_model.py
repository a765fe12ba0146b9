"""``python -m experiments.studies.level_costs_by_model``: what each level costs which model.

Four bits are free for a model whose file has four bits. Run this program on models that were
shipped in other formats as well, with one ``name``, so that their rows stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer, measured_on
from experiments.launch import launch
from experiments.study.harness import Job, Published, Study
from experiments.study.json_records import DeltaNLLRecord, delta_nll_fields
from experiments.study.table_format import TitledTable, columns_table, precise
from rap_env.levels import WeightLevel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.sources import gguf_source
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import PlanScorer

WEIGHTS: tuple[WeightLevel, ...] = ("int8", "int4", "int4-compact", "int3", "int2")
FFN_LEVELS: tuple[WeightLevel, ...] = ("int3", "int2")
CACHES = ("int8", "int4", "int2")
CAPTION = (
    "MiB of the weights that were lowered, and ΔNLL over the model as its file has it, nats per "
    "token with a 95 % interval over windows, of one level for the weights of all blocks or of "
    "their FFN, for embeddings with the head, or for all caches; in brackets the file's format. "
    "A file with four bits loses nothing at four; that says little about models shipped in more."
)

Lowered = tuple[str, str]
"""What is lowered (`LevelCostRow.what`), and to which level."""


@dataclass(frozen=True)
class LevelCostRow(DeltaNLLRecord):
    """What one level costs one model; ΔNLL is over the model as its file has it.

    Attributes:
        model: The model's name.
        shipped_format: Format of its weights as shipped, such as ``"Q4_1"`` or
            ``"bfloat16"``.
        what: What was lowered: ``"weights"`` (of all blocks), ``"FFN"``, ``"embeddings"`` or
            ``"caches"``.
        level: To which level.
        text: Name of the report text.
        lowered_bytes: Bytes of the weights that were lowered; 0 for caches.
    """

    file = "level_costs_by_model.jsonl"
    identity = ("model", "what", "level", "text")

    model: str
    shipped_format: str
    what: str
    level: str
    text: str
    lowered_bytes: int

    @property
    def lowered(self) -> Lowered:
        """What was lowered, and to which level."""
        return self.what, self.level


def level_cost_jobs(config: Config, folder: Path) -> Iterator[Job[LevelCostRow]]:
    """Yield the levels of one model; rows of other models in the file stay.

    Windows begin with the start token if the model's tokenizer adds one, as it was trained.
    """
    context = build_context(config)
    llm, held_out = context.llm, held_out_scorer(config.evaluate.text, "report", context)
    report = PlanScorer(llm, with_start(llm, held_out.corpus.tokens))
    name = Path(config.model.name).name
    text = Path(config.evaluate.text.source).parent.name or "self"
    request = Request(1, report.corpus.tokens.shape[1], budget_bytes=2**62)

    def measure(what: str, level: str, plan: Plan) -> LevelCostRow:
        sizes = context.memory.breakdown(plan, request)
        bytes_of = {
            "weights": sizes.weights,
            "FFN": sizes.ffn_weights,
            "embeddings": sizes.embeddings,
        }
        return LevelCostRow(
            model=name,
            shipped_format=shipped_format(config.model.name, llm),
            what=what,
            level=level,
            text=text,
            lowered_bytes=bytes_of.get(what, 0),
            **delta_nll_fields(report.window_nll(plan) - report.window_nll(Plan())),
        )

    for lowered, plan in lowered_everywhere(context.memory.facts).items():
        identity = name, *lowered, text
        yield Job(LevelCostRow, identity, measured_on(report), partial(measure, *lowered, plan))


def with_start(llm: ElasticLLM, tokens: torch.Tensor) -> torch.Tensor:
    """Windows behind the start token, if the model's tokenizer adds one; the last token goes."""
    if llm.tokenizer is None or llm.tokenizer("a")["input_ids"][0] != llm.tokenizer.bos_token_id:
        return tokens
    start = torch.full((len(tokens), 1), llm.tokenizer.bos_token_id)
    return torch.cat((start, tokens[:, :-1]), dim=1)


def lowered_everywhere(facts: ModelFacts) -> dict[Lowered, Plan]:
    """Every level of all weights, of the embeddings, and of all caches that exists."""
    plans: dict[Lowered, Plan] = {}
    for level in WEIGHTS:
        blocks = facts.blocks_at(level)
        if blocks:
            plans["weights", level] = Plan.of(blocks)
        ffn = {name: level for name in blocks if name.endswith(".ffn")}
        if ffn and level in FFN_LEVELS:
            plans["FFN", level] = Plan.of(ffn)
    for level in facts.embedding_levels:
        if level != "native":
            plans["embeddings", level] = Plan(embeddings=level)
    for cache in CACHES if facts.kv_heads else ():
        plans["caches", cache] = Plan.uniform(facts.num_layers, caches=cache)
    return plans


def shipped_format(model: str, llm: ElasticLLM) -> str:
    """The quantised type in the name of a model's GGUF file, or else the dtype that it runs in."""
    path = gguf_source(model)
    quantised = path and re.search(r"(?<![A-Z])I?Q\d\w*", path.stem.upper())
    return quantised[0] if quantised else llm.facts.dtype


def level_cost_tables(rows: list[LevelCostRow]) -> list[TitledTable]:
    """Bytes and ΔNLL of each level everywhere, for each model."""
    by_key = {(row.model, row.lowered): row for row in rows}

    def shown(model: str, show: Callable[[LevelCostRow], str], lowered: Lowered) -> str:
        row = by_key.get((model, lowered))
        return show(row) if row else "-"

    def mib(row: LevelCostRow) -> str:
        return f"{row.lowered_bytes / 2**20:.1f}" if row.lowered_bytes else "-"

    columns: dict[str, Callable[[Lowered], str]] = {"Lowered everywhere": " ".join}
    for model, form in {row.model: row.shipped_format for row in rows}.items():
        columns[f"{model} ({form}), MiB"] = partial(shown, model, mib)
        columns[f"{model}, ΔNLL"] = partial(shown, model, lambda row: precise(row.estimate))
    table = columns_table(dict.fromkeys(row.lowered for row in rows), columns)
    return [TitledTable(table, "One level everywhere, in two models", CAPTION)]


STUDY = Study(
    "level_costs_by_model",
    "The ladder",
    [LevelCostRow],
    level_cost_jobs,
    level_cost_tables,
    frozen=("evaluate.text",),
    published=[Published("level_costs_by_model", "ladder/level_costs_by_model")],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
