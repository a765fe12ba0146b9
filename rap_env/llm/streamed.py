"""A live model of which one layer at a time is in memory, for models larger than memory."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rap_env.errors import InvalidRequestError, UnsupportedModelError
from rap_env.llm.config import read_config
from rap_env.llm.device import choose_device, choose_dtype
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.loading import PRUNED_FILE, load_tokenizer, locate
from rap_env.llm.residency import Residency, check_residency
from rap_env.llm.stored import StoredTensor
from rap_env.llm.weight_files import open_weights
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)


def stream_llm(
    model: str | os.PathLike[str],
    *,
    max_memory_bytes: int,
    device: str = "auto",
    dtype: str = "auto",
) -> StreamedLLM:
    """Open a causal language model whose layers are read from its files when they are called.

    Embeddings, last norm and head stay in memory; of the layers, one at a time does. Scores
    are those of `load_llm` bit for bit, under the same fingerprint, so that either's serve both.

    Args:
        model: As for `load_llm`; its weights must lie in safetensors files.
        max_memory_bytes: Most bytes that weights, and what scorers compute with them, may take
            on the device; what Python and its libraries take comes on top.
        device: As for `load_llm`.
        dtype: As for `load_llm`.

    Raises:
        InvalidRequestError: The cap is too small; the message states the least that works.
        UnsupportedModelError: The family is not known, the weights do not fit the config, or
            it is a pruned checkpoint.
        UnknownNameError: The alias, device or dtype does not exist.
        ModelNotAvailableError: The model is not to be had, or not in safetensors files.
        ChecksumError: A file is damaged.
        StorageFullError: The disk is full.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    found = locate(model)
    if (found.folder / PRUNED_FILE).is_file():
        raise UnsupportedModelError(
            f"{found.folder} is a pruned checkpoint, which is loaded as a whole: use load_llm(), "
            "or stream the dense model that it was made from."
        )
    config = read_config(found.folder)
    log.info("Opening %s in %s on %s, a layer at a time", found.name, kind, place)
    cache_dir().mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="converted-", dir=cache_dir()))
    try:
        bare, stored = open_weights(found.folder, config, kind, work)
        llm = StreamedLLM(
            bare,
            load_tokenizer(found.folder),
            name=found.name,
            stored=stored,
            device=place,
            max_memory_bytes=max_memory_bytes,
        )
    except BaseException:
        _remove(work, os.getpid())
        raise
    weakref.finalize(llm, _remove, work, os.getpid())
    return llm


def _remove(folder: Path, owner: int) -> None:
    """Remove a folder, unless this process is a fork of the one that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter's place in a module, and what stands there while its layer is not held."""

    module: nn.Module
    attribute: str
    stored: StoredTensor
    empty: nn.Parameter

    def fill(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.attribute, parameter)

    def read(self, device: torch.device) -> nn.Parameter:
        return nn.Parameter(self.stored.read(device), requires_grad=False)


@dataclass
class _Held:
    """Which layer is in memory, and how many were read so far; shared by all views."""

    number: int | None = None
    reads: int = 0


class StreamedLLM(ElasticLLM):
    """An `ElasticLLM` that holds one decoder layer at a time; made by `stream_llm`.

    A layer is read when one of its modules is called, so everything works that calls the
    model, and takes its time: generation reads the kept layers once for each token. Scoring
    takes as many masks through a layer as `max_memory_bytes` allows. Parameters of
    layers that are not held are on the meta device; the model cannot be saved.

    Args:
        model: The model as `open_weights` gives it.
        tokenizer: Its tokenizer, or None where only token ids are used.
        name: What the user called the model.
        stored: Where each parameter on the meta device is, by name.
        device: Where to compute.
        max_memory_bytes: As for `stream_llm`.

    Attributes:
        max_memory_bytes: As given.

    Raises:
        InvalidRequestError: The cap is too small; the message states the least that works.
        UnsupportedModelError: The family is unknown or its layout cannot be masked.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        stored: Mapping[str, StoredTensor],
        device: torch.device,
        max_memory_bytes: int,
    ) -> None:
        super().__init__(model, tokenizer, name=name)
        self.max_memory_bytes = max_memory_bytes
        self._stored = dict(stored)
        self._held = _Held()
        self._device = device
        self._layers, resident = self._places()
        self._check_cap(resident)
        self._load_resident(resident)
        for number, places in enumerate(self._layers):
            for module in {id(place.module): place.module for place in places}.values():
                module.register_forward_pre_hook(partial(_hold, weakref.ref(self), number))

    @property
    def spare_bytes(self) -> int:
        """Bytes that the cap leaves beside the weights and stubs."""
        return self.max_memory_bytes - self._weight_bytes - sum(self.facts.stub_bytes)

    @property
    def layer_reads(self) -> int:
        """Layers that were read from files so far."""
        return self._held.reads

    def set_residency(self, residency: Residency) -> None:
        """Only ``"resident"``, which changes nothing: a streamed layer leaves by itself.

        Raises:
            UnknownNameError: There is no such residency.
            UnsupportedModelError: Another one.
        """
        check_residency(residency)
        if residency != "resident":
            raise UnsupportedModelError(
                f"A streamed model holds one layer at a time, whatever its mask is, so that there "
                f"is nothing for residency={residency!r} to free; load it with load_llm()."
            )

    def hold_layer(self, number: int) -> None:
        """Have the weights of a layer in memory; those of the layer held before are let go.

        Raises:
            ChecksumError: A file is damaged.
            ModelNotAvailableError: A file is gone.
        """
        if number == self._held.number:
            return
        self._let_go()
        self._held.number = number
        self._held.reads += 1
        try:
            for place in self._layers[number]:
                place.fill(place.read(self._device))
        except BaseException:
            self._let_go()
            raise

    def _read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._stored[name].read(torch.device("cpu")) if tensor.is_meta else tensor

    def _let_go(self) -> None:
        if self._held.number is not None:
            for place in self._layers[self._held.number]:
                place.fill(place.empty)
            self._held.number = None

    def _places(self) -> tuple[list[list[_Place]], list[_Place]]:
        """Places of each layer's parameters, (L,), and of those that stay in memory."""
        numbers = {
            id(module): number
            for number, layer in enumerate(self.adapter.layers(self.model))
            for module in layer.modules()
        }
        layers: list[list[_Place]] = [[] for _ in range(self.adapter.num_layers)]
        resident: list[_Place] = []
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._stored:
                path, _, attribute = name.rpartition(".")
                module = self.model.get_submodule(path)
                place = _Place(module, attribute, self._stored[name], parameter)
                number = numbers.get(id(module))
                (resident if number is None else layers[number]).append(place)
        return layers, resident

    def _check_cap(self, resident: list[_Place]) -> None:
        """Count what the weights take, and refuse a cap below it."""
        stay = {place.stored for place in resident}
        reading = max((stored.reading_bytes for stored in stay), default=0)
        for layer in self._layers:
            held = sum(place.stored.nbytes for place in layer)
            reading = max(reading, held + max(place.stored.reading_bytes for place in layer))
        loaded = sum(p.nbytes for p in self.model.parameters() if not p.is_meta)
        self._weight_bytes: int = loaded + sum(stored.nbytes for stored in stay) + reading
        if self.max_memory_bytes <= self._weight_bytes:
            raise InvalidRequestError(
                f"max_memory_bytes={self.max_memory_bytes:,} is too small for {self.name}: what "
                f"stays in memory and one layer take {self._weight_bytes:,} bytes; give more "
                "than that, for hidden states."
            )

    def _load_resident(self, places: list[_Place]) -> None:
        """Read what is no layer, a tied parameter once, and copy the rest to the device."""
        shared: dict[StoredTensor, list[_Place]] = defaultdict(list)
        for place in places:
            shared[place.stored].append(place)
        for group in shared.values():
            parameter = group[0].read(self._device)
            for place in group:
                place.fill(parameter)
        # A file may hold a tied parameter twice; transformers ties the two if they are equal.
        for target, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            first, second = (self.model.get_parameter(name) for name in (source, target))
            if first is not second and torch.equal(first, second):
                path, _, name = target.rpartition(".")
                setattr(self.model.get_submodule(path), name, first)
        for path, module in self.model.named_modules():
            for name, tensor in module.named_parameters(recurse=False):
                if not tensor.is_meta and f"{path}.{name}" not in self._stored:
                    # A copy, also on a CPU: transformers left a view of the mapped file there.
                    copy = tensor.detach().to(self._device, copy=True)
                    setattr(module, name, nn.Parameter(copy, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))


def _hold(llm: weakref.ref[StreamedLLM], number: int, *_: Any) -> None:
    streamed = llm()
    if streamed is not None:
        streamed.hold_layer(number)
