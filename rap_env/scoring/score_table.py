"""Scores of one model in a file, to run the environment without the model.

A table holds masks with their measured NLL, a predictor for all other masks, and the facts of the
model that an environment needs. It needs numpy only, neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.blocks import Block, BlockMask, block_name
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.memory import ModelFacts
from rap_env.scoring.fidelity import Fidelity
from rap_env.scoring.predictor import (
    DeltaNLLPredictor,
    ScoreModel,
    feature_matrix,
    fit_score_model,
)

PREFIX = "score_table:"
"""Prefix of a model name that is the path of a table."""

_KIND, _FORMAT = "score table", 3
_HEX_FORMAT = 2  # masks were hex strings with one bit per block, pessimism was called doubt
_PREDICTIONS_KEPT = 2**17


def table_path(model: str) -> Path | None:
    """The file of a model that is named ``score_table:PATH``; None for any other model."""
    return Path(model.removeprefix(PREFIX)).expanduser() if model.startswith(PREFIX) else None


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Measured and predicted NLL of one model's masks on one text.

    Attributes:
        facts: The facts of the model that the byte arithmetic needs.
        scores: Mean NLL by mask, nats per token; contains the dense model and every single
            removal.
        context: Everything that determined the scores (`MaskScorer.context`).
        text: Provenance of the text.
        settings: Settings that it was measured with: ``device``, ``dtype``, ``calibration``
            (of `CorpusConfig`), ``importance``, ``gsi_removals``, ``gsi_method`` and ``repair``
            (missing in older tables, which were measured without stubs).
        features: The importance that an agent observes (`ImportanceFeatures`), each (2L,).
        one_shot: The fields of the `OneShotProfile`.
        gsi: The fields of the `GSIProfile`, or None.
        evaluation_s: Seconds that scoring one mask took on the machine that measured it.
        predictor: Predicts delta_nll of other masks.
        fidelity: Agreement of the predictor on masks that it was not fitted to.
    """

    facts: ModelFacts
    scores: dict[BlockMask, float]
    context: dict[str, Any]
    text: dict[str, Any]
    settings: dict[str, Any]
    features: dict[str, list[float]]
    one_shot: dict[str, Any]
    gsi: dict[str, Any] | None
    evaluation_s: float
    predictor: ScoreModel
    fidelity: Fidelity

    @classmethod
    def fitted(
        cls,
        facts: ModelFacts,
        scores: Mapping[BlockMask, float],
        *,
        seed: int = 0,
        members: int = 1,
        pessimism: float = 0.0,
        **origin: Any,
    ) -> ScoreTable:
        """A table of measured scores, with a predictor fitted to them as by `fit_score_model`.

        `scores` are in nats per token; `seed` decides which masks are held out to evaluate the
        predictor; `origin` are the other attributes.

        Raises:
            ArtifactError: The dense model or a single removal was not measured, or there are
                fewer masks than twice the blocks.
        """
        singles = [BlockMask.of(index) for index in range(facts.num_blocks)]
        missing = [str(mask) for mask in (BlockMask(), *singles) if mask not in scores]
        if missing or len(scores) < 2 * facts.num_blocks:
            lacks = f" ({missing[0]}: not measured)" if missing else ""
            raise ArtifactError(
                f"{len(scores)} scores of {facts.name}{lacks} are too few for a score table, which "
                f"needs the dense model, each of {facts.num_blocks} single removals, and "
                f"{2 * facts.num_blocks} masks in all; measure more of them first."
            )
        masks = sorted(scores, key=tuple)
        nll = np.array([scores[mask] for mask in masks])
        dense = scores[BlockMask()]
        alone = np.array([scores[mask] for mask in singles]) - dense
        predictor, fidelity = fit_score_model(
            feature_matrix(masks, facts.num_blocks),
            nll - dense,
            alone,
            members=members,
            pessimism=pessimism,
            seed=seed,
        )
        held = {mask: float(scores[mask]) for mask in masks}
        return cls(facts, held, predictor=predictor, fidelity=fidelity, **origin)

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""
        return self.scores[BlockMask()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact, compressed to about 25 bytes per mask.

        Raises:
            StorageFullError: The disk is full.
        """
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("facts", "predictor", "fidelity"):
            body[name] = asdict(body[name])
        del body["scores"]
        body["masks"] = [mask.names for mask in self.scores]
        body["nll"] = list(self.scores.values())
        save_artifact(path, _KIND, _FORMAT, body, compress=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            ModelNotAvailableError: There is no such file.
            ArtifactError: It is truncated, altered, not a score table, or of an unknown format.
        """
        try:
            body = load_artifact(path, _KIND, _FORMAT, older=[_HEX_FORMAT])
        except OSError as error:
            raise ModelNotAvailableError(
                f"Cannot read the score table {os.fspath(path)} ({error.strerror}); correct the "
                "path, or make a table with ScoreTable.fitted(...).save(path), which "
                "`python -m experiments.export_scores` does in a checkout of the project."
            ) from None
        facts = ModelFacts(**with_tuples(body.pop("facts")))
        masks = _read_masks(body.pop("masks"), facts.num_blocks)
        predictor = body["predictor"]
        members = (DeltaNLLPredictor(**with_tuples(values)) for values in predictor["members"])
        pessimism = predictor.get("pessimism", predictor.get("doubt"))
        body["predictor"] = ScoreModel(tuple(members), pessimism)
        body["fidelity"] = Fidelity.from_json(body["fidelity"])
        return cls(facts=facts, scores=dict(zip(masks, body.pop("nll"), strict=True)), **body)


def _read_masks(written: Sequence[Any], num_blocks: int) -> list[BlockMask]:
    """Masks from lists of block names, or from the hex strings of earlier versions."""
    if written and isinstance(written[0], str):
        # One bit per block, the first block in the highest bit of the first byte.
        packed = np.frombuffer(bytes.fromhex("".join(written)), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(written), -1), axis=1, count=num_blocks)
        return [BlockMask.of(*np.flatnonzero(row).tolist()) for row in bits]
    index = {block_name(number): number for number in range(num_blocks)}
    return [BlockMask(frozenset(map(index.__getitem__, names))) for names in written]


class TableScorer:
    """Scores masks from a table: the interface of `MaskScorer`, without a model.

    A measured mask has exactly the score that the model gave. Any other mask has a predicted
    score; `is_predicted` tells which is which. No mask and no block is run, so their counts are 0.
    A table does not divide the text, so `num_windows` is 1. `evaluation_s` are the seconds of one
    evaluation on the machine that measured the scores.
    """

    evaluations = 0
    block_forwards = 0
    passes = 0.0
    num_windows = 1

    def __init__(self, table: ScoreTable) -> None:
        self.dense_nll = table.dense_nll
        self.context: Mapping[str, Any] = table.context
        self.evaluation_s = table.evaluation_s
        self._facts = table.facts
        self._measured = table.scores
        self._asked: set[BlockMask] = set()
        self._predict = lru_cache(_PREDICTIONS_KEPT)(table.predictor.delta_nll)

    @property
    def known(self) -> int:
        """Masks asked for so far.

        A predicted mask counts again if 131,072 others were predicted since it was asked for.
        """
        return len(self._asked) + self._predict.cache_info().misses

    def is_predicted(self, mask: BlockMask) -> bool:
        """Whether the mask was not measured, so that its score comes from the predictor."""
        return mask not in self._measured

    def nll(self, mask: BlockMask) -> float:
        """Mean NLL of the text under `mask`, nats per token; measured or predicted.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
        """
        found = self._measured.get(mask)
        if found is None:
            mask.check(self._facts.num_blocks)
            return self.dense_nll + self._predict(mask)
        self._asked.add(mask)
        return found

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order; `on_score` is called after each distinct one."""
        if on_score is not None:
            for mask in dict.fromkeys(masks):
                self.nll(mask)
                on_score(mask)
        return [self.nll(mask) for mask in masks]

    def nll_on(self, masks: Sequence[BlockMask], _windows: Sequence[int]) -> list[float]:
        """NLL of several masks on the whole text, because a table does not divide it."""
        return self.nll_many(masks)

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL if that block is removed too."""
        blocks = [block for block in self._facts.blocks if block not in mask]
        candidates = [mask | BlockMask.of(block) for block in blocks]
        return dict(zip(blocks, self.nll_many(candidates, on_score), strict=True))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a frozen dataclass from JSON, whose lists are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
