"""Score tables of tiny real models."""

from dataclasses import asdict, fields
from itertools import chain, combinations

from rap_env.context.base import PruningContext
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.score_table import ScoreTable


def all_masks(num_blocks: int, most: int | None = None) -> list[Plan]:
    """Every mask with at most so many removals."""
    sizes = range((num_blocks if most is None else most) + 1)
    sets = chain.from_iterable(combinations(range(num_blocks), size) for size in sizes)
    return [Plan.removing(*indices) for indices in sets]


def table_of(
    context: PruningContext,
    masks: list[Plan],
    importance: str = "one_shot",
    gsi_removals: int | None = None,
) -> ScoreTable:
    """A table that holds the live scores of some masks."""
    scorer = context.scorer
    tokens = scorer.corpus.tokens
    text = CorpusConfig(source="tokens", windows=tokens.shape[0], window_tokens=tokens.shape[1])
    return ScoreTable.fitted(
        context.memory.facts,
        dict(zip(masks, scorer.nll_many(masks), strict=True)),
        context=dict(scorer.context),
        text=scorer.corpus.provenance,
        settings={
            "device": "cpu",
            "dtype": context.memory.facts.dtype,
            "calibration": asdict(text),
            "importance": importance,
            "gsi_removals": gsi_removals,
            "gsi_method": "exact",
        },
        one_shot=asdict(context.one_shot),
        gsi=asdict(context.gsi) if importance == "gsi" else None,
        evaluation_s=0.25,
    )


def fitted_again(table: ScoreTable, scores: dict[Plan, float] | None = None, **how) -> ScoreTable:
    """A table of the same origin, fitted to other scores or in another way."""
    fitted = ("facts", "scores", "predictor", "fidelity")
    origin = {f.name: getattr(table, f.name) for f in fields(table) if f.name not in fitted}
    return ScoreTable.fitted(table.facts, scores or table.scores, **how, **origin)
