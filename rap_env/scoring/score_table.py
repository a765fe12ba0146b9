"""Scores of one model in a file, to run the environment without the model.

A table holds masks with their measured NLL, a predictor for masks that it lacks, and what an
environment needs to know of the model. Numpy alone: neither torch nor transformers is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.blocks import Block, BlockMask
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.memory import ModelFacts
from rap_env.scoring.ensemble import ScoreModel, fit_score_model
from rap_env.scoring.fidelity import Fidelity
from rap_env.scoring.predictor import LossPredictor, to_rows

PREFIX = "score_table:"
"""What a model's name starts with if it is the path of a table."""

_KIND, _FORMAT = "score table", 2
_PREDICTIONS_KEPT = 2**17


def table_path(model: str) -> Path | None:
    """The file of a model that is named ``score_table:PATH``; None for any other model."""
    return Path(model.removeprefix(PREFIX)).expanduser() if model.startswith(PREFIX) else None


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Measured and predicted NLL of one model's masks on one text.

    Attributes:
        facts: What the byte arithmetic needs to know of the model.
        scores: Mean NLL by set of removed blocks, nats per token; has the dense model and
            every single removal.
        context: Everything that determined the scores (`MaskScorer.context`).
        text: Provenance of the text.
        settings: Settings that it was measured with: ``device``, ``dtype``, ``calibration``
            (of `CorpusConfig`), ``importance``, ``gsi_removals``, ``gsi_method`` and ``repair``
            (which older tables lack: they were measured without stubs).
        features: What an agent sees of the importance (`ImportanceFeatures`), each (2L,).
        one_shot: The fields of the `OneShotProfile`.
        gsi: The fields of the `GSIProfile`, or None.
        evaluation_s: Seconds that scoring one mask took where it was measured.
        predictor: Predicts the loss of other masks.
        fidelity: How well it does so on masks that it was not fitted to.
    """

    facts: ModelFacts
    scores: dict[frozenset[int], float]
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
        doubt: float = 0.0,
        **origin: Any,
    ) -> ScoreTable:
        """A table of measured scores, with a predictor fitted to them.

        Args:
            facts: Of the model.
            scores: Mean NLL of masks, nats per token.
            seed: Decides which masks are held out to judge the predictor.
            members: As in `fit_score_model`, like `doubt`.
            doubt: As in `ScoreModel`.
            **origin: The other attributes.

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
        removed = to_rows(masks, facts.num_blocks)
        nll = np.array([scores[mask] for mask in masks])
        dense = scores[BlockMask()]
        alone = np.array([scores[mask] for mask in singles]) - dense
        predictor, fidelity = fit_score_model(
            removed, nll - dense, alone, members=members, doubt=doubt, seed=seed
        )
        held = {mask.indices: float(scores[mask]) for mask in masks}
        return cls(facts, held, predictor=predictor, fidelity=fidelity, **origin)

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""
        return self.scores[frozenset()]

    @property
    def loss_alone(self) -> npt.NDArray[np.float64]:
        """Loss without each block alone, nats per token, (2L,)."""
        blocks = range(self.facts.num_blocks)
        return np.array([self.scores[frozenset([index])] for index in blocks]) - self.dense_nll

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact, about 45 bytes a mask.

        Raises:
            StorageFullError: The disk is full.
        """
        removed = to_rows(list(self.scores), self.facts.num_blocks)
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("facts", "predictor", "fidelity"):
            body[name] = asdict(body[name])
        del body["scores"]
        # One bit a block, the first block in the highest bit of the first byte.
        body["masks"] = [row.tobytes().hex() for row in np.packbits(removed, axis=1)]
        body["nll"] = list(self.scores.values())
        save_artifact(path, _KIND, _FORMAT, body)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            ModelNotAvailableError: There is no such file.
            ArtifactError: It is truncated, altered, no score table, or of another format.
        """
        try:
            body = load_artifact(path, _KIND, _FORMAT)
        except OSError as error:
            raise ModelNotAvailableError(
                f"Cannot read the score table {os.fspath(path)} ({error.strerror}); correct the "
                "path, or make one with `python -m experiments.export_scores`."
            ) from None
        facts = ModelFacts(**with_tuples(body.pop("facts")))
        packed = np.frombuffer(bytes.fromhex("".join(body.pop("masks"))), dtype=np.uint8)
        nll = body.pop("nll")
        removed = np.unpackbits(packed.reshape(len(nll), -1), axis=1, count=facts.num_blocks)
        rows, blocks = np.nonzero(removed)
        ends = np.cumsum(np.bincount(rows, minlength=len(nll)))[:-1]
        masks = (frozenset(part.tolist()) for part in np.split(blocks, ends))
        members = (LossPredictor(**with_tuples(m)) for m in body["predictor"]["members"])
        body["predictor"] = ScoreModel(tuple(members), body["predictor"]["doubt"])
        body["fidelity"] = Fidelity.from_json(body["fidelity"])
        return cls(facts=facts, scores=dict(zip(masks, nll, strict=True)), **body)


class TableScorer:
    """Scores of masks out of a table: what `MaskScorer` gives, without a model.

    A mask that was measured has the very score that the model gave; any other one a predicted
    score, which `is_predicted` tells.

    Args:
        table: Where the scores are.

    Attributes:
        evaluations: 0: no mask is ever run.
        block_forwards: 0: no block is.
        passes: 0 as well.
        num_windows: 1: a table knows of no parts of the text.
        dense_nll: NLL of the dense model, nats per token.
        context: Everything that determined the scores.
        evaluation_s: Seconds that one evaluation took where the scores were measured.
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
        self._asked: set[frozenset[int]] = set()
        self._loss = lru_cache(_PREDICTIONS_KEPT)(table.predictor.loss)

    @property
    def known(self) -> int:
        """Masks asked for so far.

        A predicted one counts again if 131,072 others were predicted since it was asked for.
        """
        return len(self._asked) + self._loss.cache_info().misses

    def is_predicted(self, mask: BlockMask) -> bool:
        """Whether the mask was not measured, so that its score comes from the predictor."""
        return mask.indices not in self._measured

    def nll(self, mask: BlockMask) -> float:
        """Mean NLL of the text under `mask`, nats per token; measured or predicted.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
        """
        found = self._measured.get(mask.indices)
        if found is None:
            mask.check(self._facts.num_blocks)
            return self.dense_nll + self._loss(mask.indices)
        self._asked.add(mask.indices)
        return found

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order.

        Args:
            masks: What to score.
            on_score: Called after each different mask, for progress bars.
        """
        if on_score is not None:
            for mask in dict.fromkeys(masks):
                self.nll(mask)
                on_score(mask)
        return [self.nll(mask) for mask in masks]

    def nll_on(self, masks: Sequence[BlockMask], _windows: Sequence[int]) -> list[float]:
        """NLL of several masks on the whole text, which is the only part there is."""
        return self.nll_many(masks)

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL without that block too."""
        blocks = [block for block in self._facts.blocks if block not in mask]
        candidates = [mask | BlockMask.of(block) for block in blocks]
        return dict(zip(blocks, self.nll_many(candidates, on_score), strict=True))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a frozen dataclass out of JSON, which knows lists alone."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
