"""A trained policy as one small file, with all that is needed to choose masks for a live model.

It is a safetensors file, so reading it executes no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rap_env.artifacts import atomic_write, canonical_json, digest
from rap_env.errors import ArtifactError
from rap_env.model_facts import ModelFacts
from rap_env.observation import ImportanceFeatures
from rap_env.runtime.policy_network import NetworkWeights

log = logging.getLogger(__name__)

_KIND, _FORMAT = "exported policy", 1
_HEADER = "rap_policy"
_EXPORT_AGAIN = (
    'use the packaged policy "rap", or export the policy again (in a checkout of the repository: '
    "`python -m experiments.export_policy`)"
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


@dataclass(frozen=True, eq=False)
class PolicyFile:
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
                f"{self.model.name} has {blocks}; {_EXPORT_AGAIN}."
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
        arrays = self._arrays()
        body = {
            "model": asdict(self.model),
            "settings": {
                "hidden": self.weights.hidden,
                "block_vectors": self.weights.block_vectors,
                "without": list(self.weights.without),
            },
            "provenance": self.provenance,
            "arrays_sha256": _arrays_hash(arrays),
        }
        header = {"kind": _KIND, "format": _FORMAT, "sha256": digest(body), "body": body}
        with atomic_write(path) as file:
            file.write(safetensors.numpy.save(arrays, {_HEADER: canonical_json(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicyFile:
        """Read a file written by `save`.

        Raises:
            ArtifactError: The file is truncated, altered, of a newer format, or no exported policy.
        """
        path = Path(path)
        if not path.exists():
            raise ArtifactError(f"There is no exported policy at {path}; {_EXPORT_AGAIN}.")
        text, arrays = _read(path)
        altered = ArtifactError(f"{path} was altered after it was written; {_EXPORT_AGAIN}.")
        try:
            header = json.loads(text)
            found = header.get("kind"), header.get("format")
            if found != (_KIND, _FORMAT):
                raise ArtifactError(
                    f"{path} has kind {found[0]!r} and format {found[1]!r}, but this version reads "
                    f"{_KIND!r} of format {_FORMAT}; use the version that wrote it, or "
                    f"{_EXPORT_AGAIN}."
                )
            body = header["body"]
            hashes = digest(body), _arrays_hash(arrays)
            if hashes != (header["sha256"], body["arrays_sha256"]):
                raise altered
            weights = _part(arrays, _NETWORK)
            return cls(
                NetworkWeights(**weights, without=tuple(body["settings"]["without"])),
                ImportanceFeatures(**_part(arrays, _FEATURES)),
                tuple(int(index) for index in arrays[_ORDER]),
                PolicyModel(**body["model"]),
                body["provenance"],
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
            raise altered from None

    def _arrays(self) -> Arrays:
        features = {e.name: getattr(self.features, e.name) for e in fields(self.features)}
        named = {f"{_NETWORK}{name}": array for name, array in self.weights.arrays().items()}
        named |= {f"{_FEATURES}{n}": np.asarray(v, np.float64) for n, v in features.items()}
        named[_ORDER] = np.array(self.order, dtype=np.int64)
        return {name: np.ascontiguousarray(array) for name, array in named.items()}


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
            f"{path} is truncated or not an exported policy; {_EXPORT_AGAIN}."
        ) from None
    if text is None:
        raise ArtifactError(f"{path} holds tensors, but no exported policy; {_EXPORT_AGAIN}.")
    return text, arrays


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _arrays_hash(arrays: Arrays) -> str:
    """SHA-256 of all arrays with their names, dtypes and shapes, in hex."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
