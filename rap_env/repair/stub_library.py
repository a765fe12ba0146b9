"""The stub library: a stub for each block of one model, saved as a checked file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from rap_env.artifacts import atomic_write, canonical_json, digest
from rap_env.blocks import block_index, block_name
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.models.families.placeholders import Stub
from rap_env.models.live.elastic import ElasticLLM

_KIND, _FORMAT = "stub library", 1
_PARTS = ("down", "up", "mean")


@dataclass(frozen=True, eq=False)
class StubLibrary:
    """The stubs that take the place of removed blocks of one model.

    Attributes:
        model: Name of the model that the stubs were fitted on.
        fingerprint: SHA-256 of its weights and config, in hex.
        stubs: By index of the block, on the CPU; a removed block without a stub adds nothing.
        provenance: How they were made: method, text, settings.
    """

    model: str
    fingerprint: str
    stubs: Mapping[int, Stub]
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tensors and of the model's fingerprint, in hex."""
        total = hashlib.sha256(self.fingerprint.encode())
        for name, tensor in sorted(self._tensors().items()):
            total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all stubs."""
        return sum(stub.nbytes for stub in self.stubs.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each stub, by name of its block."""
        return {block_name(index): stub.rank for index, stub in sorted(self.stubs.items())}

    def check(self, llm: ElasticLLM) -> None:
        """Raise an `ArtifactError` if the stubs are of another model, or of another dtype."""
        if llm.fingerprint != self.fingerprint:
            raise ArtifactError(
                f"These stubs were fitted on {self.model} with other weights or another dtype than "
                f"the {llm.name} ({llm.facts.dtype}) that is loaded; fit stubs for this model, or "
                "load the other one."
            )

    def attach(self, llm: ElasticLLM) -> ElasticLLM:
        """Return a view of the live model with these stubs in the place of removed blocks.

        It shares weights and mask with `llm`, and can be used wherever a model is expected:
        scorers, importance, memory arithmetic, generation, `save_pruned`.

        Raises:
            ArtifactError: The stubs were fitted on another model, or in another dtype.
        """
        self.check(llm)
        placed = {index: stub.on(llm.device) for index, stub in self.stubs.items()}
        return llm.repaired(placed, self.sha256)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a safetensors file with checksum; an existing file is replaced.

        Raises:
            StorageFullError: The disk is full; the previous file is intact.
        """
        body: dict[str, Any] = {"model": self.model, "fingerprint": self.fingerprint}
        body |= {"sha256": self.sha256, "provenance": self.provenance}
        header = {"kind": _KIND, "format": str(_FORMAT), "body": canonical_json(body)}
        header["body_sha256"] = digest(body)
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(self._tensors(), header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StubLibrary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or not a stub library of this format.
        """
        path = Path(path)
        again = "fit it again with rap_env.repair.fitting.fit_library(...).save(path)"
        if not path.exists():
            raise FileNotFoundError(f"There is no stub library at {path}; {again}.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            raise ArtifactError(f"{path} is truncated or not a stub library; {again}.") from None
        if (header.get("kind"), header.get("format")) != (_KIND, str(_FORMAT)):
            raise ArtifactError(
                f"{path} is not a stub library of format {_FORMAT}, but "
                f"{header.get('kind')!r} of format {header.get('format')}; {again}."
            )
        try:
            body = json.loads(header["body"])
            library = cls(body["model"], body["fingerprint"], _stubs(tensors), body["provenance"])
            intact = (digest(body), library.sha256) == (header["body_sha256"], body["sha256"])
        except (AttributeError, KeyError, TypeError, ValueError, UnknownNameError):
            intact = False
        if not intact:
            raise ArtifactError(
                f"{path} was altered after it was written (checksum differs); {again}."
            )
        return library

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{block_name(index)}.{part}": getattr(stub, part).detach()
            for index, stub in self.stubs.items()
            for part in _PARTS
        }


def _stubs(tensors: Mapping[str, torch.Tensor]) -> dict[int, Stub]:
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return {
        block_index(name): Stub(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in names
    }
