"""Pinned tasks by name: an environment with its arguments, and the requests of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import package_json
from rap_env.errors import check_name
from rap_env.request import Request
from rap_env.reward import ceiling_nll, plan_scores
from rap_env.scoring.corpus import CorpusConfig

if TYPE_CHECKING:
    import gymnasium

Floats = npt.NDArray[np.float64]

SPLITS = ("calibration", "test")
"""The text that rewards come from and that methods search on, and text that no method has
seen."""


@dataclass(frozen=True)
class PinnedTask:
    """An environment with fixed arguments, and the requests at which policies are compared.

    Attributes:
        name: Its id for `gymnasium.make`.
        environment: ``"RAPPrune-v0"`` or ``"RAPLadder-v0"``.
        arguments: The arguments of the environment.
        requests: The requests, each with its budget in bytes.
        comparison: Tasks with the same comparison have the same model and requests; one has
            the live model, the other a score table.
        calibration_sha256: Hash of the tokens of the calibration text.
        test_text: Provenance of the text of the split ``"test"``, with its hash.
        vocab_size: Entries of the model's vocabulary, from which the ceiling of a score
            follows.
        reward_threshold: Mean return of the best measured plans on requests of the workload.
    """

    name: str
    environment: str
    arguments: Mapping[str, Any]
    requests: tuple[Request, ...]
    comparison: str
    calibration_sha256: str
    test_text: Mapping[str, Any]
    vocab_size: int
    reward_threshold: float

    @property
    def live(self) -> bool:
        """Whether it runs the model itself."""
        return not str(self.arguments["model"]).startswith("score_table:")

    @property
    def ceiling_nll(self) -> float:
        """The most nats per token that a plan within its budget counts as."""
        return ceiling_nll(self.vocab_size)

    def scores(self, delta_nll: Sequence[float], fits: Sequence[bool]) -> Floats:
        """What plans count as, nats per token; `rap_env.reward.plan_scores` has the rule."""
        return plan_scores(delta_nll, fits, self.vocab_size)

    def sha256_of(self, split: str) -> str:
        """Hash of the tokens of a split's text, in hex."""
        return self.calibration_sha256 if split == "calibration" else self.test_text["sha256"]

    @property
    def test_text_config(self) -> CorpusConfig:
        """The text of the split ``"test"``; the package has its tokens."""
        names = ("source", "windows", "window_tokens", "seed", "role", "sha256")
        return CorpusConfig(**{name: self.test_text[name] for name in names})

    def make(self, **arguments: Any) -> gymnasium.Env[Any, Any]:
        """The environment; `arguments` such as ``render_mode`` are added to the fixed ones."""
        import gymnasium

        return gymnasium.make(self.name, **arguments)


@cache
def pinned_tasks() -> dict[str, PinnedTask]:
    """All pinned tasks by name."""
    comparisons = package_json(__package__, "tasks.json")
    tasks = {}
    for comparison, values in comparisons.items():
        requests = tuple(Request(*request) for request in values["requests"])
        for name, arguments in values["tasks"].items():
            tasks[name] = PinnedTask(
                name=name,
                environment=values["environment"],
                arguments={**values["arguments"], **arguments},
                requests=requests,
                comparison=comparison,
                calibration_sha256=values["calibration_sha256"],
                test_text=values["test_text"],
                vocab_size=values["vocab_size"],
                reward_threshold=values["reward_threshold"],
            )
    return tasks


def tasks_of(comparison: str) -> list[PinnedTask]:
    """The pinned tasks of a comparison: that with its score table, and that with the live model."""
    return [task for task in pinned_tasks().values() if task.comparison == comparison]


def pinned_task(name: str) -> PinnedTask:
    """The pinned task of a name.

    Raises:
        UnknownNameError: There is none; the message lists all.
    """
    tasks = pinned_tasks()
    check_name("pinned task", name, tasks)
    return tasks[name]
