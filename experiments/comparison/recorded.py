"""Plans of earlier results, to be measured again on another text or on tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.comparison.records import ResultRow, rows_below
from experiments.study.errors import ExperimentError
from experiments.study.records import record_files
from rap_env.artifacts import digest
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.request import Request

_MEASURED = ("report_text", "report_sha256", "tasks")
"""What the losses and accuracies of a row depend on, and its choice does not."""

_EQUAL = {
    "model_fingerprint": "model",
    "dtype": "dtype",
    "repair": "stubs",
    "calibration_sha256": "calibration text",
}
"""What must not differ: peaks and the choices themselves depend on it."""


def read_recorded(paths: Iterable[str], depends_on: Mapping[str, Any]) -> list[ResultRow]:
    """Read the rows of earlier results, each once.

    Args:
        paths: Files, or folders with ``results.jsonl`` at any depth.
        depends_on: What the new rows depend on.

    Raises:
        ExperimentError: There are no rows, or they are of another model or calibration text: the
            new report text is only known to share nothing with the configured one.
        ArtifactError: A record is damaged.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        below = [path] if path.is_file() else record_files(path, "results.jsonl")
        files |= dict.fromkeys(file.resolve() for file in below)
    rows = {row.key: row for file in files for row in ResultRow.read(file)}
    if not rows:
        raise ExperimentError(
            f"There are no results in {', '.join(paths)}; evaluate.plans names folders or files "
            "that experiments.evaluate wrote."
        )
    for row in rows.values():
        recorded = row.provenance.get("depends_on", {})
        for key, words in _EQUAL.items():
            if recorded.get(key) != depends_on.get(key):
                raise ExperimentError(
                    f"The recorded plans of {row.method} were chosen with another {words} "
                    f"({str(recorded.get(key))[:12]} instead of {str(depends_on.get(key))[:12]}); "
                    "give the settings of that evaluation, apart from evaluate.text and "
                    "evaluate.tasks."
                )
    return list(rows.values())


class RecordedPlans(Policy):
    """The plans that a method chose in an earlier evaluation, as a policy.

    Args:
        name: The method, and the name of the policy.
        path: A folder with ``results.jsonl`` at any depth.
        fingerprint: That of the model.

    Raises:
        ExperimentError: There are no rows of this method and model.
        ArtifactError: A record is damaged.
    """

    def __init__(self, name: str, path: str, fingerprint: str) -> None:
        self.name, self._path = name, path
        self._plans = {
            Request(**row.request, budget_bytes=row.budget_bytes): row.plan
            for row in rows_below(Path(path))
            if row.method == name
            and row.provenance.get("depends_on", {}).get("model_fingerprint") == fingerprint
        }
        if not self._plans:
            raise ExperimentError(f"{path} has no plans of {name} for this model.")

    def choose(self, request: Request) -> Plan:
        """Return the plan that was recorded for a request.

        Raises:
            ExperimentError: There is none.
        """
        if request not in self._plans:
            raise ExperimentError(f"{self._path} has no plan of {self.name} for {request}.")
        return self._plans[request]


def again_depends_on(row: ResultRow, depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recorded plan's new row depends on: the recorded choice, the new text."""
    measured = {key: depends_on[key] for key in _MEASURED}
    plan = digest(row.plan.to_json())
    return {**row.provenance.get("depends_on", {}), **measured, "plan": plan}
