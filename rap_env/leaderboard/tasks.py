"""Pinned tasks by name: an environment with its arguments, and the requests of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rap_env.artifacts import package_json
from rap_env.errors import check_name
from rap_env.request import Request

if TYPE_CHECKING:
    import gymnasium

SPLITS = ("calibration", "test")
"""The text that rewards come from and that methods search on, and text that no method has seen."""


@dataclass(frozen=True)
class PinnedTask:
    """An environment with fixed arguments, and the requests at which policies are compared.

    Attributes:
        name: Its id for `gymnasium.make`.
        environment: ``"RAPPrune-v0"`` or ``"RAPLadder-v0"``.
        arguments: The arguments of the environment.
        requests: The requests, each with its budget in bytes.
        comparison: Tasks with the same comparison have the same model and requests; one has the
            live model, the other a score table.
        calibration_sha256: Hash of the tokens of the calibration text.
        test_text: Provenance of the text of the split ``"test"``, with its hash.
        reward_threshold: Mean return of the best measured plans on requests of the workload.
    """

    name: str
    environment: str
    arguments: Mapping[str, Any]
    requests: tuple[Request, ...]
    comparison: str
    calibration_sha256: str
    test_text: Mapping[str, Any]
    reward_threshold: float

    @property
    def live(self) -> bool:
        """Whether it runs the model itself."""
        return not str(self.arguments["model"]).startswith("score_table:")

    def sha256_of(self, split: str) -> str:
        """Hash of the tokens of a split's text, in hex."""
        return self.calibration_sha256 if split == "calibration" else self.test_text["sha256"]

    def make(self, **arguments: Any) -> gymnasium.Env[Any, Any]:
        """The environment; `arguments` such as ``render_mode`` are added to the fixed ones."""
        import gymnasium

        return gymnasium.make(self.name, **arguments)


@cache
def pinned_tasks() -> dict[str, PinnedTask]:
    """All pinned tasks by name."""
    comparisons = package_json(__package__, "tasks.json")
    found = {}
    for comparison, values in comparisons.items():
        requests = tuple(Request(*request) for request in values["requests"])
        for name, arguments in values["tasks"].items():
            found[name] = PinnedTask(
                name=name,
                environment=values["environment"],
                arguments={**values["arguments"], **arguments},
                requests=requests,
                comparison=comparison,
                calibration_sha256=values["calibration_sha256"],
                test_text=values["test_text"],
                reward_threshold=values["reward_threshold"],
            )
    return found


def pinned_task(name: str) -> PinnedTask:
    """The pinned task of a name.

    Raises:
        UnknownNameError: There is none; the message lists all.
    """
    tasks = pinned_tasks()
    check_name("pinned task", name, tasks)
    return tasks[name]
