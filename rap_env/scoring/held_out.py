"""Losses on held-out text beside a score table: what a plan loses on text that no method searched.

A table has the scores of thousands of plans on the calibration text, and far fewer were
measured on held-out text as well. For the others the held-out ΔNLL is predicted from the ΔNLL
on the calibration text, which it follows closely: a ridge regression predicts the log of the
ratio of both, also from what the plan leaves out. It stays within the range of the measured
ratios, so that a plan unlike all measured ones is not taken for a good one. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rap_env.errors import ArtifactError
from rap_env.levels import GROUP_TOKENS
from rap_env.plan import Plan
from rap_env.scoring.fidelity import SMALL_DELTA_NLL, Fidelity

Floats = npt.NDArray[np.float64]

_RIDGE = 0.3
_FOLDS = 10
_LEAST_PLANS = 100


@dataclass(frozen=True, eq=False)
class HeldOutLosses:
    """ΔNLL of plans on held-out text, measured or predicted.

    Attributes:
        text: Provenance of the held-out text.
        measured: ΔNLL of the measured plans on that text, nats per token.
        weights: Weights of the predicted log ratio, in the order of `_features`.
        log_ratios: The least and the greatest log ratio of the measured plans.
        fidelity: Agreement on measured plans that the weights were not fitted to.
        num_blocks: 2L.
    """

    text: dict[str, Any]
    measured: dict[Plan, float]
    weights: tuple[float, ...]
    log_ratios: tuple[float, float]
    fidelity: Fidelity
    num_blocks: int

    @classmethod
    def fitted(
        cls,
        text: Mapping[str, Any],
        measured: Mapping[Plan, float],
        calibration: Mapping[Plan, float],
        num_blocks: int,
        seed: int = 0,
    ) -> Self:
        """Fit the prediction; its fidelity is that of ten folds.

        Args:
            text: Provenance of the held-out text.
            measured: ΔNLL on the held-out text, nats per token.
            calibration: ΔNLL of the same plans on the calibration text, nats per token.
            num_blocks: 2L.
            seed: Divides the plans into folds.

        Raises:
            ArtifactError: There are fewer than 100 plans.
        """
        plans = [plan for plan in measured if plan != Plan()]
        if len(plans) < _LEAST_PLANS:
            raise ArtifactError(
                f"{len(plans)} plans were measured on the held-out text, which is too few to "
                f"predict others; measure {_LEAST_PLANS}."
            )
        searched = np.array([calibration[plan] for plan in plans])
        values = np.array([measured[plan] for plan in plans])
        inputs = _features(plans, searched, num_blocks)
        ratios = _scaled(values) - _scaled(searched)
        predicted = np.zeros(len(plans))
        order = np.random.default_rng(seed).permutation(len(plans))
        for fold in range(_FOLDS):
            part = order[fold::_FOLDS]
            kept = np.setdiff1d(order, part)
            fit = _solved(inputs[kept], ratios[kept])
            predicted[part] = _predicted(inputs[part], searched[part], fit, _range(ratios[kept]))
        removed = np.array([len(plan.removed) for plan in plans])
        fidelity = Fidelity.of(
            predicted, values, removed, num_blocks, len(plans) - len(plans) // _FOLDS
        )
        weights = tuple(_solved(inputs, ratios).tolist())
        return cls(dict(text), dict(measured), weights, _range(ratios), fidelity, num_blocks)

    def delta_nll(self, plan: Plan, calibration_delta_nll: float) -> float:
        """ΔNLL of a plan on the held-out text, nats per token.

        Args:
            plan: The plan.
            calibration_delta_nll: Its ΔNLL on the calibration text, nats per token.
        """
        if plan == Plan():
            return 0.0
        if plan in self.measured:
            return self.measured[plan]
        searched = np.array([calibration_delta_nll])
        inputs = _features([plan], searched, self.num_blocks)
        return float(_predicted(inputs, searched, np.array(self.weights), self.log_ratios)[0])

    def is_predicted(self, plan: Plan) -> bool:
        """Whether the plan was not measured on the held-out text."""
        return plan not in self.measured and plan != Plan()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file; `from_json` reads them."""
        return {
            "text": self.text,
            "plans": [plan.levels for plan in self.measured],
            "delta_nll": list(self.measured.values()),
            "weights": list(self.weights),
            "log_ratios": list(self.log_ratios),
            "fidelity": asdict(self.fidelity),
            "num_blocks": self.num_blocks,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        plans = map(Plan.of, values["plans"])
        return cls(
            text=values["text"],
            measured=dict(zip(plans, values["delta_nll"], strict=True)),
            weights=tuple(values["weights"]),
            log_ratios=tuple(values["log_ratios"]),
            fidelity=Fidelity.from_json(values["fidelity"]),
            num_blocks=values["num_blocks"],
        )


def _features(plans: Sequence[Plan], calibration: Floats, num_blocks: int) -> Floats:
    """A cubic of the log of the calibration ΔNLL, and shares of what is left out, (N, 19)."""
    x = _scaled(calibration)[:, None]
    shares = np.array([_shares(plan, num_blocks) for plan in plans])
    return np.hstack([np.ones_like(x), x, x**2, x**3, shares, shares**2, shares * x])


def _shares(plan: Plan, num_blocks: int) -> list[float]:
    """Shares of removed attention and feed-forward blocks and of windows, and the embeddings."""
    windows = [level.window_tokens for _, level in plan.caches if level.window_tokens]
    layers = num_blocks / 2
    return [
        plan.count_removed("attn") / layers,
        plan.count_removed("ffn") / layers,
        len(windows) / layers,
        sum(GROUP_TOKENS / tokens for tokens in windows) / layers,  # shorter ones count more
        float(plan.embeddings != "native"),
    ]


def _solved(inputs: Floats, ratios: Floats) -> Floats:
    """Weights of a ridge regression to log ratios."""
    penalty = _RIDGE * np.eye(inputs.shape[1])
    solved = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ ratios)
    return np.asarray(solved, dtype=np.float64)


def _predicted(
    inputs: Floats, searched: Floats, weights: Floats, log_ratios: tuple[float, float]
) -> Floats:
    """Held-out ΔNLL of plans, nats per token, (N,).

    Args:
        inputs: Their `_features`.
        searched: Their ΔNLL on the calibration text, nats per token, (N,).
        weights: Weights of the log ratio.
        log_ratios: The range that it stays in.
    """
    scaled = _scaled(searched) + np.clip(inputs @ weights, *log_ratios)
    return np.exp(scaled) - SMALL_DELTA_NLL


def _range(ratios: Floats) -> tuple[float, float]:
    return float(ratios.min()), float(ratios.max())


def _scaled(delta_nll: Floats) -> Floats:
    """The log of ΔNLL; values near 0 are not told apart."""
    return np.log(np.maximum(delta_nll, 0.0) + SMALL_DELTA_NLL)
