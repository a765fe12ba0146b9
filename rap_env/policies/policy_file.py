"""A trained policy as one small file, with all that is needed to choose masks for a live model.

It is a safetensors file, so reading it executes no code. Policies that choose plans have a kind of
their own, `rap_env.policies.network.LadderPolicyFile`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rap_env.artifacts import atomic_write, canonical_json, digest
from rap_env.errors import ArtifactError
from rap_env.ladder.observation import ImportanceFeatures
from rap_env.model_facts import ModelFacts
from rap_env.policies.block_network import NetworkWeights

log = logging.getLogger(__name__)

_FORMAT = 1
_HEADER = "rap_policy"
EXPORT_AGAIN = (
    'use the packaged policy "rap-v0", or export the policy again (in a checkout of the '
    "repository: `python -m experiments.export_policy`)"
)
_ORDER, _FEATURES, _NETWORK = "order", "features.", "network."

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PolicyModel:
    """The model that a policy was exported for.

    Attributes:
        name: The name that the user gave.
        fingerprint: SHA-256 over its weights and config, in hex.
        dtype: Name of the weights' dtype.
        num_blocks: 2L.
    """

    name: str
    fingerprint: str
    dtype: str
    num_blocks: int

    @classmethod
    def of(cls, facts: ModelFacts) -> PolicyModel:
        """The facts of a model that a policy file stores."""
        return cls(facts.name, facts.fingerprint, facts.dtype, facts.num_blocks)


class ExportedPolicy(ABC):
    """A policy as a file of one kind."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, body: dict[str, Any], arrays: Arrays) -> Self:
        """The policy from the parts of a file."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`.

        Raises:
            ArtifactError: The file is truncated, altered, of a newer format, or of another kind.
        """
        return read_policy(path, cls)


@dataclass(frozen=True, eq=False)
class PolicyFile(ExportedPolicy):
    """A trained block-wise policy, with the importance features of the model it was exported for.

    Attributes:
        weights: Weights and settings of the network.
        features: Importance of the model's blocks.
        order: The model's blocks in GSI order (the order of removal), length 2L; empty if the
            policy was trained without importance.
        provenance: How the policy was trained: agent, seed, steps, versions.

    Raises:
        ArtifactError: The parts are of models with different numbers of blocks.
    """

    kind: ClassVar[str] = "exported policy"

    weights: NetworkWeights
    features: ImportanceFeatures
    order: tuple[int, ...]
    model: PolicyModel
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = self.model.num_blocks
        _check_features(self.features, blocks, self.model.name)
        if self.order and sorted(self.order) != list(range(blocks)):
            raise ArtifactError(
                f"The order of a policy for {self.model.name} must list each of its {blocks} "
                f"blocks once, but is {list(self.order)}."
            )
        if self.weights.block_vectors and len(self.weights.vectors) != blocks:
            raise ArtifactError(
                f"The policy has vectors for {len(self.weights.vectors)} blocks, but "
                f"{self.model.name} has {blocks}; {EXPORT_AGAIN}."
            )

    def features_for(
        self, facts: ModelFacts, features: ImportanceFeatures | None = None
    ) -> tuple[ImportanceFeatures, tuple[int, ...]]:
        """The importance features that the policy observes for a model, and the removal order.

        Args:
            facts: The model to serve. A warning is logged if its weights are not those that the
                policy was exported for.
            features: Importance of its blocks; None takes the file's.

        Raises:
            ArtifactError: The policy cannot serve a model of this shape, or `features` are of a
                model with another number of blocks.
        """
        own = self.model
        if self.weights.block_vectors and facts.num_blocks != own.num_blocks:
            raise ArtifactError(
                f"The policy for {own.name} has vectors for {own.num_blocks} blocks, but "
                f"{facts.name} has {facts.num_blocks} blocks. Train a policy for this model, or "
                "one with policy_settings.block_vectors=0, which serves both."
            )
        if features is not None:
            _check_features(features, facts.num_blocks, facts.name)
            return features, order_of(features)
        if facts.num_blocks != own.num_blocks:
            raise ArtifactError(
                f"The policy was exported for {own.name} with {own.num_blocks} blocks, but "
                f"{facts.name} has {facts.num_blocks}; give the importance of its blocks "
                "(features=), or export a policy for it."
            )
        if facts.fingerprint != own.fingerprint:
            log.warning(
                "The policy was exported for %s (%s), and %s (%s) has other weights: it uses the "
                "importance of the former's blocks, so its masks may be worse.",
                own.name, own.dtype, facts.name, facts.dtype,
            )  # fmt: skip
        return self.features, self.order

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as a safetensors file with a checksum, and replace an existing file.

        Raises:
            StorageFullError: The disk is full; an existing file stays intact.
        """
        named: Arrays = {
            f"{_FEATURES}{entry.name}": np.asarray(getattr(self.features, entry.name), np.float64)
            for entry in fields(self.features)
        }
        named[_ORDER] = np.array(self.order, dtype=np.int64)
        write_policy(path, self.kind, self.weights, named, self.model, self.provenance)

    @classmethod
    def of(cls, body: dict[str, Any], arrays: Arrays) -> Self:
        """The policy from the parts of a file."""
        return cls(
            weights_of(NetworkWeights, body, arrays),
            ImportanceFeatures(**part_of(arrays, _FEATURES)),
            tuple(int(index) for index in arrays[_ORDER]),
            PolicyModel(**body["model"]),
            body["provenance"],
        )


_Read = TypeVar("_Read", bound=ExportedPolicy)


def write_policy(
    path: str | os.PathLike[str],
    kind: str,
    weights: NetworkWeights,
    arrays: Mapping[str, npt.NDArray[Any]],
    model: PolicyModel,
    provenance: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write a policy as a safetensors file with a checksum, and replace an existing file.

    Args:
        path: The file.
        kind: The kind of the file.
        weights: Weights and settings of the network.
        arrays: Further arrays by name.
        model: The model that it was exported for.
        provenance: How it was trained.
        **more: Further entries of the header, as JSON values.

    Raises:
        StorageFullError: The disk is full; an existing file stays intact.
    """
    named = {f"{_NETWORK}{name}": array for name, array in weights.arrays().items()} | {**arrays}
    named = {name: np.ascontiguousarray(array) for name, array in named.items()}
    body = {
        "model": asdict(model),
        "settings": {
            "hidden": weights.hidden,
            "block_vectors": weights.block_vectors,
            "without": list(weights.without),
        },
        "provenance": provenance,
        **more,
        "arrays_sha256": _arrays_hash(named),
    }
    header = {"kind": kind, "format": _FORMAT, "sha256": digest(body), "body": body}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(named, {_HEADER: canonical_json(header)}))


def read_policy(path: str | os.PathLike[str], *kinds: type[_Read]) -> _Read:
    """Read a file of one of some kinds.

    Raises:
        ArtifactError: The file is truncated, altered, of a newer format, or of none of the kinds.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"There is no exported policy at {path}; {EXPORT_AGAIN}.")
    text, arrays = _read(path)
    altered = ArtifactError(f"{path} was altered after it was written; {EXPORT_AGAIN}.")
    try:
        header = json.loads(text)
        found = header.get("kind"), header.get("format")
        known = {(kind.kind, _FORMAT): kind for kind in kinds}
        if found not in known:
            named = " or ".join(repr(kind.kind) for kind in kinds)
            raise ArtifactError(
                f"{path} has kind {found[0]!r} and format {found[1]!r}, but this version reads "
                f"{named} of format {_FORMAT}; use the version that wrote it, or {EXPORT_AGAIN}."
            )
        body = header["body"]
        hashes = digest(body), _arrays_hash(arrays)
        if hashes != (header["sha256"], body["arrays_sha256"]):
            raise altered
        return known[found].of(body, arrays)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
        raise altered from None


_Weights = TypeVar("_Weights", bound=NetworkWeights)


def weights_of(cls: type[_Weights], body: Mapping[str, Any], arrays: Arrays) -> _Weights:
    """The network of a file."""
    return cls(**part_of(arrays, _NETWORK), without=tuple(body["settings"]["without"]))


def order_of(features: ImportanceFeatures) -> tuple[int, ...]:
    """The blocks in GSI order by their ranks; empty if all ranks are equal, as without GSI."""
    if not np.ptp(features.gsi_rank):
        return ()
    return tuple(int(index) for index in np.argsort(features.gsi_rank, kind="stable"))


def _check_features(features: ImportanceFeatures, blocks: int, name: str) -> None:
    for entry in fields(features):
        shape = np.shape(getattr(features, entry.name))
        if shape != (blocks,):
            raise ArtifactError(
                f"The importance of {name} must have {blocks} values of {entry.name}, one a block, "
                f"but its shape is {shape}."
            )


def _read(path: Path) -> tuple[str, Arrays]:
    """Read the JSON header and the arrays of a file with any content."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_HEADER)
            names = list(file.keys()) if text is not None else []
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError):  # TypeError: a dtype that NumPy lacks
        raise ArtifactError(
            f"{path} is truncated or not an exported policy; {EXPORT_AGAIN}."
        ) from None
    if text is None:
        raise ArtifactError(f"{path} holds tensors, but no exported policy; {EXPORT_AGAIN}.")
    return text, arrays


def part_of(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _arrays_hash(arrays: Arrays) -> str:
    """SHA-256 of all arrays with their names, dtypes and shapes, in hex."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
