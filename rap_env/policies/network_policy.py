"""A trained policy: its file, and its choices for live requests.

The file is a safetensors file with all that is needed to choose plans for a live model, so
reading it executes no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from rap_env.artifacts import atomic_write, canonical_json, digest
from rap_env.errors import ArtifactError
from rap_env.ladder.features import IMPORTANCE_TYPES, Importance
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.method import Basis
from rap_env.policies.network import NetworkWeights, PolicyNetwork
from rap_env.policies.packaged_files import packaged_file
from rap_env.policies.registry import makes, reads
from rap_env.request import Request

log = logging.getLogger(__name__)

KIND = "exported policy"
"""The kind of a policy's file."""

_PACKAGED = {"rap": "ladder", "rap-low-bits": "low-bits", "rap-recall": "recall"}
"""The trained policies over levels in the package, and the names of their files."""

_REMOVES = "rap-v0"
"""The trained policy in the package that removes blocks."""

_FORMAT = 2
_HEADER = "rap_policy"
_AGAIN = (
    "use a packaged policy, or export the policy again (in a checkout of the repository: "
    "`python -m experiments.export_policy`)"
)
_NETWORK, _IMPORTANCE = "network.", "importance."
_CACHED_CHOICES = 1024

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class PolicyFile:
    """A trained policy, with the importance that it observes of the model it was exported for.

    Attributes:
        weights: Weights and settings of the network.
        importance: Importance of the model's blocks, or of the levels of its items.
        ladder: `Ladder.spec` of the ladder that it was trained on.
        items: Names of the model's items with a lower level, and the levels of each.
        model: The model that it was exported for: its name, fingerprint and dtype.
        provenance: How the policy was trained: agent, seed, steps, versions.
    """

    weights: NetworkWeights
    importance: Importance
    ladder: dict[str, Any]
    items: dict[str, list[str]]
    model: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def made(
        cls, weights: NetworkWeights, encoder: ObservationEncoder, provenance: dict[str, Any]
    ) -> PolicyFile:
        """The file of a policy for the model and the importance that an encoder observes."""
        facts, ladder = encoder.memory.facts, encoder.ladder
        model = {"name": facts.name, "fingerprint": facts.fingerprint, "dtype": facts.dtype}
        return cls(weights, encoder.importance, ladder.spec, _levels(ladder), model, provenance)

    def encoder_for(self, memory: MemoryModel, base: Plan = Plan()) -> ObservationEncoder:
        """What encodes the policy's observations of a model.

        Args:
            memory: The model to serve. A warning is logged if its weights are not those that
                the policy was exported for.
            base: Levels of caches that the policy does not choose, see `LadderBytes`.

        Raises:
            ArtifactError: The policy cannot serve a model with these items.
        """
        own, facts = self.model, memory.facts
        ladder = Ladder.of(facts, **self.ladder)
        if _levels(ladder) != self.items:
            raise ArtifactError(
                f"The policy was exported for {own['name']}, whose items have other levels than "
                f"those of {facts.name} as it is loaded ({facts.weights} weights): "
                f"{len(self.items)} and {len(ladder)} items. Load the model as it was (a packaged "
                "policy over levels needs weights='native'), or export a policy for it."
            )
        if facts.fingerprint != own["fingerprint"]:
            log.warning(
                "The policy was exported for %s (%s), and %s (%s) has other weights: it uses the "
                "importance of the former's items, so its plans may be worse.",
                own["name"],
                own["dtype"],
                facts.name,
                facts.dtype,
            )
        return ObservationEncoder(LadderBytes(memory, ladder, base), self.importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as a safetensors file with a checksum, and replace an existing file.

        Raises:
            StorageFullError: The disk is full; an existing file stays intact.
        """
        importance = {n: np.asarray(a, np.float64) for n, a in vars(self.importance).items()}
        arrays: Arrays = {f"{_NETWORK}{n}": array for n, array in self.weights.arrays().items()}
        arrays |= {f"{_IMPORTANCE}{name}": array for name, array in importance.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        body = {
            "rows": self.weights.rows,
            "features": list(self.weights.spec.features),
            "without": list(self.weights.without),
            "ladder": self.ladder,
            "items": self.items,
            "model": self.model,
            "provenance": self.provenance,
            "arrays_sha256": _arrays_hash(arrays),
        }
        header = {"kind": KIND, "format": _FORMAT, "sha256": digest(body), "body": body}
        with atomic_write(path) as file:
            file.write(safetensors.numpy.save(arrays, {_HEADER: canonical_json(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicyFile:
        """Read what `save` wrote.

        Raises:
            ArtifactError: The file is truncated, altered, or of another format.
        """
        path = Path(path)
        if not path.exists():
            raise ArtifactError(f"There is no exported policy at {path}; {_AGAIN}.")
        text, arrays = _read(path)
        altered = ArtifactError(f"{path} was altered after it was written; {_AGAIN}.")
        try:
            header = json.loads(text)
            if (header["kind"], header["format"]) != (KIND, _FORMAT):
                raise ArtifactError(
                    f"{path} has kind {header['kind']!r} and format {header['format']!r}, but this "
                    f"version reads {KIND!r} of format {_FORMAT}; use the version that wrote it, "
                    f"or {_AGAIN}."
                )
            body = header["body"]
            hashes = digest(body), _arrays_hash(arrays)
            if hashes != (header["sha256"], body["arrays_sha256"]):
                raise altered
            weights = NetworkWeights(
                **_part(arrays, _NETWORK), rows=body["rows"], without=tuple(body["without"])
            )
            if body["features"] != list(weights.spec.features):
                raise ArtifactError(
                    f"{path} observes {body['features']}, but this version observes "
                    f"{list(weights.spec.features)}; {_AGAIN}."
                )
            importance = IMPORTANCE_TYPES[weights.rows](**_part(arrays, _IMPORTANCE))
            names = ("ladder", "items", "model", "provenance")
            return cls(weights, importance, *(body[name] for name in names))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
            raise altered from None


def _levels(ladder: Ladder) -> dict[str, list[str]]:
    return {item.name: list(item.levels) for item in ladder.items}


def _read(path: Path) -> tuple[str, Arrays]:
    """Read the JSON header and the arrays of a file with any content."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_HEADER)
            names = list(file.keys()) if text is not None else []
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError):
        raise ArtifactError(f"{path} is truncated or not an exported policy; {_AGAIN}.") from None
    if text is None:
        raise ArtifactError(f"{path} holds tensors, but no exported policy; {_AGAIN}.")
    return text, arrays


def _part(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _arrays_hash(arrays: Arrays) -> str:
    """SHA-256 of all arrays with their names, dtypes and shapes, in hex."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


class NetworkPolicy(Policy):
    """A trained network, which lowers its best item until the request fits.

    If no plan fits, it lowers every item as far as possible. Threads may share a policy.

    Args:
        memory: The model's byte arithmetic.
        file: The exported policy.
        name: The policy's name.
        caches: Levels for all caches, from the most to the least exact one, if the network
            chooses none. It sees the bytes of the first one at which it can make the request
            fit.

    Attributes:
        file: The exported policy.
        encoder: Encodes the network's observations.
        ladder: The items of the model.
        order: Blocks in the order of their removal, (2L,); None if the ladder does not remove
            all of them, or the policy was trained without an order.

    Raises:
        ArtifactError: The policy cannot serve this model.
    """

    def __init__(
        self, memory: MemoryModel, file: PolicyFile, name: str = "rap", caches: Sequence[str] = ()
    ) -> None:
        self.memory, self.file, self.name = memory, file, name
        self._bases = [Plan.uniform(memory.facts.num_layers, caches=n) for n in caches] or [Plan()]
        self._networks = [
            PolicyNetwork(file.weights, file.encoder_for(memory, base)) for base in self._bases
        ]
        self.encoder = self._networks[0].encoder
        self.ladder = self.encoder.ladder
        self.weight_levels = self.ladder.weight_levels
        order = self.encoder.importance.removal_order(self.ladder)
        self.order = order if len(order) == memory.facts.num_blocks else None
        self._cached_choice = lru_cache(maxsize=_CACHED_CHOICES)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the levels that the network chooses so that the request fits.

        Raises:
            InvalidRequestError: The model cannot serve the batch size or the length.
        """
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        if self.memory.peak_bytes(Plan(), request) <= request.budget_bytes:
            return Plan()
        pairs = zip(self._networks, self._bases, strict=True)
        fitting = (pair for pair in pairs if pair[0].can_fit(request))
        network, base = next(fitting, (self._networks[-1], self._bases[-1]))
        plan = network.plan(request)
        return base.without(*plan.removed) if base else plan

    def delta_nll(self, plan: Plan, seq_len_tokens: int | None = None) -> float | None:
        """Rise in NLL that the order over items predicts for a plan, nats per token.

        It is the sum of what the order's steps added when it was made, whatever the length of
        sequences; None if the policy has no such order, or its ladder does not have the
        plan's levels.
        """
        if not self.ladder.has(plan):
            return None
        return self.encoder.importance.delta_nll(self.ladder.positions(plan))


@reads(KIND)
def _read_policy(path: Path, memory: MemoryModel) -> Policy:
    return NetworkPolicy(memory, PolicyFile.load(path))


def _packaged_policy(name: str, memory: MemoryModel, basis: Basis | None) -> Policy:
    return NetworkPolicy(memory, packaged_network(_PACKAGED[name]), name=name)


def packaged_network(file_name: str) -> PolicyFile:
    """A trained policy in the package, by the name of its file."""
    return PolicyFile.load(packaged_file(f"{file_name}.safetensors"))


for _name in _PACKAGED:
    makes(_name)(partial(_packaged_policy, _name))


@makes(_REMOVES)
def _packaged_removal(memory: MemoryModel, basis: Basis | None) -> Policy:
    """In a comparison, on caches at int8, else at int4, if its ladder has these levels."""
    levels = () if basis is None else basis.ladder_bytes.ladder.cache_levels
    caches = [level for level in ("int8", "int4") if level in levels]
    return NetworkPolicy(memory, packaged_network("blocks"), _REMOVES, caches)
