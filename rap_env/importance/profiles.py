"""Importance profiles of a model as artifacts: saved, loaded and checked without torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import load_artifact, save_artifact, with_tuples
from rap_env.errors import ArtifactError
from rap_env.memory import HasFacts
from rap_env.plan import block_index, block_name

if TYPE_CHECKING:
    from rap_env.scoring.scorer import PlanScorer

GSI_METHODS = ("exact", "lazy")
"""Methods of `rap_env.gsi`."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profile of one model, saved as a checked JSON artifact.

    Attributes:
        evaluations: Masks that the profile needs, including stored ones: the cost without a
            store.
        evaluations_run: Masks that the model ran; fewer than `evaluations` if a store already
            had some.
        block_forwards: Blocks that the model ran, in passes over the whole text; parts of the
            text count by their share.
        seconds: Wall time of what the model ran, summed over all interrupted runs.
        provenance: Model, text and everything else that determined the scores.
    """

    KIND: ClassVar[str]
    FORMAT: ClassVar[int]

    evaluations: int
    evaluations_run: int
    block_forwards: float
    seconds: float
    provenance: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a checked JSON artifact."""
        save_artifact(path, self.KIND, self.FORMAT, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or of another model.
        """
        return cls(**load_profile(path, cls.KIND, cls.FORMAT, model))

    def with_added(self, spent: Mapping[str, float]) -> dict[str, Any]:
        """Its fields that tell what it took, with what more was spent."""
        return {name: getattr(self, name) + more for name, more in spent.items()}


class ScoringMeter:
    """What a scorer runs from now on.

    Args:
        scorer: Counts its evaluations and the blocks that it runs.
    """

    def __init__(self, scorer: PlanScorer) -> None:
        self._scorer, self._began = scorer, time.perf_counter()
        self._before = scorer.evaluations, scorer.block_forwards

    def spent(self, evaluations: int) -> dict[str, Any]:
        """The fields of a `Profile` for so many evaluations."""
        run, forwards = self._before
        return {
            "evaluations": evaluations,
            "evaluations_run": self._scorer.evaluations - run,
            "block_forwards": self._scorer.block_forwards - forwards,
            "seconds": time.perf_counter() - self._began,
        }


@dataclass(frozen=True, kw_only=True)
class OneShotProfile(Profile):
    """Scores of the 2L blocks of a native model.

    Attributes:
        dense_nll: NLL of the native model, nats per token.
        nll_without: NLL without each block, nats per token, length 2L.
        influence: Block influence of each block, length 2L (see `block_influence`).
    """

    KIND = "one-shot importance"
    FORMAT = 1

    dense_nll: float
    nll_without: tuple[float, ...]
    influence: tuple[float, ...]

    @property
    def delta_nll(self) -> npt.NDArray[np.float64]:
        """Rise in NLL if a block is removed from the native model, nats per token, (2L,)."""
        return np.array(self.nll_without) - self.dense_nll

    @property
    def block_influence(self) -> npt.NDArray[np.float64]:
        """1 - cosine between the residual stream before and after each block, (2L,)."""
        return np.array(self.influence)


@dataclass(frozen=True, kw_only=True)
class GSIProfile(Profile):
    """The result of GSI (RAP, arXiv 2505.17138, Algorithm 1) on one model and text.

    The arrays are those of an order that removes blocks.

    Attributes:
        method: ``"exact"`` or ``"lazy"``, see `rap_env.gsi`.
        levels: The levels of each item, by its name.
        together: Levels that all caches take together.
        dense_nll: NLL of the native model, nats per token.
        order: Names of the items in the order in which they are lowered by one level; may
            stop before all are at their lowest.
        nll_after: NLL after each action, nats per token.
        first_nll: NLL after each action alone that the first round examined, nats per token,
            by the item's name.
        last_rises: Last known rise in NLL of the next step of items, nats per token, by name.
        candidates: Items examined in each round.
    """

    KIND = "GSI profile"
    FORMAT = 3

    method: str
    levels: dict[str, list[str]]
    together: tuple[str, ...]
    dense_nll: float
    order: tuple[str, ...] = ()
    nll_after: tuple[float, ...] = ()
    first_nll: dict[str, float] = field(default_factory=dict)
    last_rises: dict[str, float] = field(default_factory=dict)
    candidates: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        """2L, if the items are blocks."""
        return len(self.levels)

    @property
    def order_indices(self) -> tuple[int, ...]:
        """Blocks in the order of their removal, least important first."""
        return tuple(map(block_index, self.order))

    @property
    def first_pass(self) -> npt.NDArray[np.float64]:
        """Rise in NLL if one block is removed from the native model, nats per token, (2L,)."""
        names = map(block_name, range(self.num_blocks))
        return np.array([self.first_nll[name] for name in names]) - self.dense_nll

    @property
    def full_order(self) -> tuple[int, ...]:
        """All blocks: the measured order, then the rest by their last known rise in NLL."""
        rest, rises = set(range(self.num_blocks)) - set(self.order_indices), self.marginal_delta_nll
        return (*self.order_indices, *sorted(rest, key=lambda index: (rises[index], index)))

    @property
    def rank(self) -> npt.NDArray[np.float64]:
        """Place of each block in the full order, 0 = removed first, 1 = last, (2L,)."""
        rank = np.empty(self.num_blocks)
        rank[list(self.full_order)] = np.linspace(0, 1, self.num_blocks)
        return rank

    @property
    def marginal_delta_nll(self) -> npt.NDArray[np.float64]:
        """Rise in NLL at each block's removal, nats per token, (2L,).

        For blocks that are left: the rise in the last round that examined them; after an
        exact search, that is the last round.
        """
        delta_nll = self.first_pass
        for name, rise in self.last_rises.items():
            delta_nll[block_index(name)] = rise
        delta_nll[list(self.order_indices)] = np.diff([self.dense_nll, *self.nll_after])
        return delta_nll


def load_profile(
    path: str | os.PathLike[str], kind: str, version: int, model: HasFacts
) -> dict[str, Any]:
    """The fields of a saved profile of this model, lists as tuples.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactError: It is truncated, altered, or made from other weights.
    """
    body = load_artifact(path, kind, version)
    check_measured(path, body["provenance"], model)
    return with_tuples(body)


def check_measured(
    path: str | os.PathLike[str], provenance: Mapping[str, Any], model: HasFacts
) -> None:
    """Check that what a file holds was measured on a model, by the provenance in the file.

    Raises:
        ArtifactError: It was measured with other weights.
    """
    if provenance["fingerprint"] != model.facts.fingerprint:
        raise ArtifactError(
            f"{os.fspath(path)} was made from {provenance['model']} with other weights or another "
            f"dtype than the {model.facts.name} ({model.facts.dtype}) that is loaded; profile "
            "this model, or load it with other weights (such as bf16) or dtype."
        )
