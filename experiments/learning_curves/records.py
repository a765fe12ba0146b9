"""Records of learning curves: a line of versions, then a line for each evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "results" / "examples"
"""Folder of the committed records."""


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of an agent in training.

    Attributes:
        steps: Steps of the environment so far; offline, actions of the dataset learned from.
        delta_nll: Mean ΔNLL over the requests of the task, nats per token.
        process_s: Seconds of the process so far, without those of the evaluations.
    """

    seed: int
    steps: int
    delta_nll: float
    process_s: float


def write_points(path: Path, points: Sequence[CurvePoint], provenance: dict[str, str]) -> Path:
    """Write the curves of a trainer, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"provenance": provenance}, *map(asdict, points)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_points(path: Path) -> dict[int, list[CurvePoint]]:
    """Read the curves of a trainer, by seed."""
    found: dict[int, list[CurvePoint]] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        point = CurvePoint(**json.loads(line))
        found.setdefault(point.seed, []).append(point)
    return found
