"""Scores of one model in a file, to run the environment without the model.

A table holds plans with their measured NLL, a predictor for all other ones, costs of
levels, which plans are predicted from, and the facts of the model that an environment needs.
It needs numpy only, neither torch nor transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import load_artifact, save_artifact, with_tuples
from rap_env.errors import ArtifactError, ModelNotAvailableError, UnknownNameError
from rap_env.ladder.items import Counts, Ladder
from rap_env.memory import ModelFacts
from rap_env.plan import Plan
from rap_env.scoring.fidelity import Fidelity
from rap_env.scoring.held_out import HeldOutLosses
from rap_env.scoring.interface import OnScore
from rap_env.scoring.predictor import (
    CorrectionNetwork,
    DeltaNLLPredictor,
    Features,
    Floats,
    Lowered,
    PlanFeatures,
    ScoreModel,
    lowered_cost,
)
from rap_env.scoring.predictor_fit import (
    feature_matrix,
    fit_scores,
    necessary_plans,
)

PREFIX = "score_table:"
"""Prefix of a model name that is the name or path of a table."""

TABLES = Path(__file__).parent / "tables"
"""Folder of the tables in the package, ``MODEL.WEIGHTS.json`` each."""

_KIND, _FORMAT = "score table", 10
_PREDICTIONS_KEPT = 2**17
_LADDERS_KEPT = 8

Levels = tuple[dict[bytes, float], PlanFeatures | None]


def packaged_tables() -> list[Path]:
    """The tables in the package: for each model, one of its native and of its bf16 weights."""
    return sorted(TABLES.glob("*.json"))


def packaged_names() -> list[str]:
    """The models of the tables in the package."""
    return sorted({path.name.partition(".")[0] for path in packaged_tables()})


def table_path(model: str, weights: str = "bf16") -> Path | None:
    """The file of a model named ``score_table:NAME`` or ``score_table:PATH``; None for any other.

    Args:
        model: NAME is a packaged model, such as ``smollm2-135m``.
        weights: How a model of that name is loaded: ``"bf16"`` for `RAPPrune-v0`,
            ``"native"`` for `RAPLadder-v0`.
    """
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    if name in packaged_names():
        return TABLES / f"{name}.{weights}.json"
    return Path(name).expanduser()


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Measured and predicted NLL of one model's plans on one text.

    Attributes:
        facts: The facts of the model that the byte arithmetic needs.
        scores: Mean NLL by plan, nats per token; contains the native model and every
            single removal.
        context: Everything that determined the scores (`PlanScorer.context`).
        text: Provenance of the text.
        settings: Settings that it was measured with: ``device``, ``dtype``, ``calibration``
            (of `CorpusConfig`), ``importance``, ``gsi_removals`` and ``gsi_method``.
        one_shot: The fields of the `OneShotProfile`.
        gsi: The fields of the `GSIProfile`, or None.
        evaluation_s: Seconds that scoring one plan took on the machine that measured it.
        predictor: Predicts delta_nll of other plans.
        fidelity: Agreement of the predictor on those that it was not fitted to.
        levels: The fields of the `LevelCosts`, or None: it then has and predicts removals
            only.
        held_out: Losses on text that no plan was searched on, or None.
    """

    facts: ModelFacts
    scores: dict[Plan, float]
    context: dict[str, Any]
    text: dict[str, Any]
    settings: dict[str, Any]
    one_shot: dict[str, Any]
    gsi: dict[str, Any] | None
    evaluation_s: float
    predictor: ScoreModel
    fidelity: Fidelity
    levels: dict[str, Any] | None = None
    held_out: HeldOutLosses | None = None

    @classmethod
    def fitted(
        cls,
        facts: ModelFacts,
        scores: Mapping[Plan, float],
        *,
        lowered: Lowered | None = None,
        seed: int = 0,
        members: int = 1,
        pessimism: float = 0.0,
        **origin: Any,
    ) -> ScoreTable:
        """A table of measured scores, with a predictor fitted to them as by `fit_scores`.

        Args:
            facts: As the attribute.
            scores: Those of plans, nats per token.
            lowered: Gives the sum of what the levels of a plan cost alone, nats per token,
                such as `LevelCosts.delta_nll`; None if the plans only remove blocks.
            seed: Decides which plans are held out to evaluate the predictor.
            members: Predictors of the ensemble.
            pessimism: As in `ScoreModel`.
            **origin: The other attributes.

        Raises:
            ArtifactError: The native model or a single removal was not measured, or there are
                fewer scores to fit than twice the blocks.
            UnknownNameError: A plan lowers an item that it keeps, and `lowered` is None.
        """
        # The samples that predictors are fitted to depend on the order.
        order = sorted(scores, key=lambda p: (not p.is_mask, sorted(p.removed) * p.is_mask))
        measured = {plan: float(scores[plan]) for plan in order}
        needed = necessary_plans(facts.num_blocks)
        missing = [str(mask) for mask in needed if mask not in scores]
        if missing or len(measured) < 2 * facts.num_blocks:
            lacks = f" ({missing[0]}: not measured)" if missing else ""
            raise ArtifactError(
                f"{len(measured)} scores of {facts.name}{lacks} are too few for a score table, "
                f"which needs the native model, each of {facts.num_blocks} single removals, and "
                f"{2 * facts.num_blocks} scores in all; measure more of them first."
            )
        predictor, fidelity = fit_scores(
            measured,
            facts.num_blocks,
            lowered,
            members=members,
            pessimism=pessimism,
            seed=seed,
        )
        return cls(facts, measured, predictor=predictor, fidelity=fidelity, **origin)

    @property
    def native_nll(self) -> float:
        """NLL of the native model, nats per token."""
        return self.scores[Plan()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact, compressed to about 25 bytes per plan.

        Raises:
            StorageFullError: The disk is full.
        """
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("facts", "predictor", "fidelity"):
            body[name] = asdict(body[name])
        if self.held_out is not None:
            body["held_out"] = self.held_out.to_json()
        del body["scores"]
        body["plans"] = [plan.levels for plan in self.scores]
        body["nll"] = list(self.scores.values())
        save_artifact(path, _KIND, _FORMAT, body, compress=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            ModelNotAvailableError: There is no such file.
            ArtifactError: It is truncated, altered, not a score table, or of an unknown
                format.
        """
        try:
            body = load_artifact(path, _KIND, _FORMAT)
        except OSError as error:
            name, _, weights = Path(path).stem.partition(".")
            # A packaged model, with the weights of the other task.
            if Path(path).parent == TABLES:
                environments = {"bf16": "RAPPrune-v0", "native": "RAPLadder-v0"}
                names = [p.stem.split(".")[0] for p in packaged_tables() if weights in p.stem]
                raise ModelNotAvailableError(
                    f"{environments.pop(weights)} has no packaged score table of {name}, only of "
                    f"{', '.join(names)}; the one of {name} is for {environments.popitem()[1]}."
                ) from None
            raise ModelNotAvailableError(
                f"Cannot read the score table {os.fspath(path)} ({error.strerror}); correct the "
                f"path, name a packaged table ({', '.join(packaged_names())}), or make a table "
                "with ScoreTable.fitted(...).save(path), which `python -m "
                "experiments.export_scores` does in a checkout of the project."
            ) from None
        facts, plans = ModelFacts.from_json(body.pop("facts")), map(Plan.of, body.pop("plans"))
        predictor = body["predictor"]
        members = map(_read_predictor, predictor["members"])
        body["predictor"] = ScoreModel(tuple(members), predictor["pessimism"])
        body["fidelity"] = Fidelity.from_json(body["fidelity"])
        if body["held_out"] is not None:
            body["held_out"] = HeldOutLosses.from_json(body["held_out"])
        return cls(facts=facts, scores=dict(zip(plans, body.pop("nll"), strict=True)), **body)


def _read_predictor(values: dict[str, Any]) -> DeltaNLLPredictor:
    if values["correction"] is not None:
        values["correction"] = CorrectionNetwork(**with_tuples(values["correction"]))
    return DeltaNLLPredictor(**with_tuples(values))


class TableScorer:
    """Scores plans from a table: the interface of `PlanScorer`, without a model.

    A measured plan has exactly the score that the model gave. Any other one has a
    predicted score; `is_predicted` tells which is which. No block is run, so counts are 0.
    A table does not divide the text, so `num_windows` is 1. `evaluation_s` are the seconds of
    one evaluation on the machine that measured the scores.

    Args:
        table: The table.
        lowered: As in `ScoreTable.fitted`.
    """

    evaluations = 0
    block_forwards = 0
    passes = 0.0
    num_windows = 1

    def __init__(self, table: ScoreTable, lowered: Lowered | None = None) -> None:
        self._lowered = lowered
        self.native_nll = table.native_nll
        self.context: Mapping[str, Any] = table.context
        self.evaluation_s = table.evaluation_s
        self._facts = table.facts
        self._measured = table.scores
        self._asked: set[Any] = set()
        self._forgotten = 0
        self._model = table.predictor
        self._predictions: dict[Plan, float] = {}
        self._levels: dict[Ladder, Levels] = {}

    @property
    def known(self) -> int:
        """Plans asked for so far.

        One counts again if 131,072 others were asked for since.
        """
        return self._forgotten + len(self._asked) + len(self._predictions)

    def is_predicted(self, plan: Plan) -> bool:
        """Whether the plan was not measured, so that its score comes from the predictor."""
        return plan not in self._measured

    def nll(self, plan: Plan) -> float:
        """Mean NLL of the text under a plan, nats per token; measured or predicted.

        Raises:
            UnknownNameError: The plan names blocks that the model does not have, or lowers an
                item and was not measured, and its levels are not predicted.
        """
        nll = self._measured.get(plan)
        if nll is None:
            plan.check(self._facts.num_blocks)
            return self.native_nll + self._predicted(plan)
        self._asked.add(plan)
        return nll

    def _predicted(self, plan: Plan) -> float:
        """Predicted delta_nll, nats per token."""
        if plan in self._predictions:
            return self._predictions[plan]
        if len(self._predictions) == _PREDICTIONS_KEPT:
            self._forgotten += len(self._predictions)
            self._predictions.clear()
        features = feature_matrix([plan], self._facts.num_blocks)
        lowered = np.array([lowered_cost(plan, self._lowered)])
        mask_nll = np.array([self._measured.get(Plan(plan.removed), math.nan)])
        predicted = float(self._predicted_many(features, lowered, mask_nll)[0])
        self._predictions[plan] = predicted
        return predicted

    def _predicted_many(self, features: Features, lowered: Floats, mask_nll: Floats) -> Floats:
        """Predicted delta_nll of plans, nats per token, (n,); relative to those of known masks.

        Args:
            features: Their removed blocks, (n, 2L).
            lowered: What their other lowered items cost alone, nats per token, (n,).
            mask_nll: The measured NLL of the plans that only remove these blocks, nats per
                token, NaN where there is none, (n,).
        """
        (known,) = np.isfinite(mask_nll).nonzero()
        asked = np.concatenate([features, features[known]])
        of_all = self._model.of_members(asked, np.append(lowered, np.zeros(len(known))))
        predicted, of_masks = of_all[: len(lowered)], of_all[len(lowered) :]
        rises = (mask_nll[known] - self.native_nll)[:, None]
        predicted[known] = rises + predicted[known] - of_masks
        return self._model.bound(predicted)

    def nll_at(self, ladder: Ladder, positions: Counts) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """NLL of the plans with some positions of their levels on a ladder, (n, items).

        Returns:
            NLL in nats per token, and whether it is predicted, (n,) each. That of a plan does
            not depend on the others.

        Raises:
            UnknownNameError: As for `nll`.
        """
        measured, features = self._levels_of(ladder)
        keys = _keys(positions)
        self._asked.update(keys)
        if len(self._asked) > _PREDICTIONS_KEPT:
            self._forgotten += len(self._asked)
            self._asked.clear()
        nll = np.array([measured.get(key, math.nan) for key in keys])
        predicted = np.isnan(nll)
        if predicted.any():
            rows = positions[predicted]
            if features is None:
                delta_nll = np.array([self._predicted(ladder.plan(row)) for row in rows.tolist()])
            else:
                masks = [measured.get(key, math.nan) for key in _keys(features.masks(rows))]
                inputs = features.removed(rows), features.lowered(rows)
                delta_nll = self._predicted_many(*inputs, np.array(masks))
            nll[predicted] = self.native_nll + delta_nll
        return nll, predicted

    def _levels_of(self, ladder: Ladder) -> Levels:
        """What `_make_levels` gives for a ladder, made once for all with the same items."""
        if ladder in self._levels:
            return self._levels[ladder]
        if len(self._levels) == _LADDERS_KEPT:
            self._levels.clear()
        alike = (levels for known, levels in self._levels.items() if known.items == ladder.items)
        levels = self._levels[ladder] = next(alike, None) or self._make_levels(ladder)
        return levels

    def _make_levels(self, ladder: Ladder) -> Levels:
        """Measured NLL by what `_keys` gives for a plan, and the predictor's inputs.

        These are None if a level of the ladder has no cost.
        """
        on_ladder = [(plan, nll) for plan, nll in self._measured.items() if ladder.has(plan)]
        positions = np.array([ladder.positions(plan) for plan, _ in on_ladder])
        measured = dict(zip(_keys(positions), (nll for _, nll in on_ladder), strict=True))
        costs = np.zeros((len(ladder), ladder.width))
        try:
            for number, item in enumerate(ladder.items):
                for position, level in enumerate(item.levels):
                    plan = Plan.of({item.name: level})
                    costs[number, position] = lowered_cost(plan, self._lowered)
        except UnknownNameError:
            return measured, None
        return measured, PlanFeatures(ladder, costs, self._facts.num_blocks)

    def nll_many(self, plans: Sequence[Plan], on_score: OnScore | None = None) -> list[float]:
        """NLL of several plans, in their order; `on_score` is called after each one."""
        if on_score is not None:
            for plan in dict.fromkeys(plans):
                self.nll(plan)
                on_score(plan)
        return [self.nll(plan) for plan in plans]

    def nll_on(self, plans: Sequence[Plan], _windows: Sequence[int]) -> list[float]:
        """NLL of several plans on the whole text, because a table does not divide it."""
        return self.nll_many(plans)


def _keys(positions: Counts) -> list[bytes]:
    """A key for each row of positions (n, items)."""
    width, row_bytes = positions.shape[1], positions.astype(np.int8).tobytes()
    return [row_bytes[start : start + width] for start in range(0, len(row_bytes), width)]
