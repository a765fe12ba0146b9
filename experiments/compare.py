"""``python -m experiments.compare``: any set of run folders side by side, from records alone.

Rows of other models, texts or repairs are groups of their own and never averaged together. The
answer goes to the standard output, and nothing else does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import hydra
import numpy as np
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.comparison.groups import Group, read_groups
from experiments.comparison.summaries import Cell, Comparison
from experiments.comparison.text import as_markdown, as_text
from experiments.config import CompareConfig
from experiments.launch import CONF_DIR, fail, message
from rap_env.errors import RapError


def compare(config: CompareConfig) -> str:
    """What is known of the methods in some folders.

    Args:
        config: Which folders, and the form of the answer.

    Returns:
        The answer, in the form that was asked for.

    Raises:
        ExperimentError: A folder does not exist, or there are no records.
        ArtifactError: A record is damaged, or two contradict each other.
    """
    groups, learning = read_groups(config.folders)
    if config.format == "json":
        return json.dumps(result_rows(groups), indent=1, allow_nan=False)
    return (as_text if config.format == "text" else as_markdown)(groups, learning)


def result_rows(groups: list[Group]) -> list[dict[str, Any]]:
    """A row for each group, part, method and cell; losses are on report text, nats per token."""
    return [
        _row(group, comparison, method, cell)
        for group in groups
        for comparison in group.parts.values()
        for method in comparison.compared
        for cell in sorted({row.cell for row in comparison.rows if row.method == method})
    ]


def _row(group: Group, comparison: Comparison, method: str, cell: Cell) -> dict[str, Any]:
    rows = comparison.at(method, cell)
    loss = comparison.loss_at(method, cell)
    assert loss is not None  # the cell is one of the method's
    trained = [row.training_s for row in rows if row.training_s is not None]
    depends = group.depends_on
    return {
        "comparison": group.name,
        "model": group.model,
        "repair": group.repair,
        "part": comparison.part,
        "method": method,
        "learned": method in comparison.learned,
        "request": f"{cell[0]}x{cell[1]}",
        "budget_fraction": cell[2],
        "sparsity": rows[0].sparsity,
        "loss_mean": loss.mean,
        "ci_low": loss.low,
        "ci_high": loss.high,
        "loss_calibration_mean": float(np.mean([row.loss_calibration for row in rows])),
        "seeds": len(rows),
        "fits": all(row.fits for row in rows),
        "kv_aware": all(row.kv_aware for row in rows),
        "evaluations": float(np.mean([row.evaluations for row in rows])),
        "decision_s": float(np.median([row.decision_s for row in rows])),
        "setup_evaluations": max(row.setup_evaluations for row in rows),
        "training_s": float(np.mean(trained)) if trained else None,
        "report_sha256": depends.get("report_sha256"),
        "calibration_sha256": depends.get("calibration_sha256"),
    }


@hydra.main(version_base=None, config_path=str(CONF_DIR), config_name="compare")
def _answer(node: DictConfig) -> None:
    config = OmegaConf.to_object(node)
    assert isinstance(config, CompareConfig)  # conf/compare.yaml starts from its schema
    try:
        answer = compare(config)
    except RapError as error:  # here, since Hydra adds words of its own to what leaves a job
        fail(str(error))
    sys.stdout.write(f"{answer}\n")


def main() -> None:
    """Print the answer; a mistake ends in one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a traceback
    try:
        _answer()
    except (RapError, HydraException, OmegaConfBaseException) as error:
        fail(message(error))


if __name__ == "__main__":
    main()
