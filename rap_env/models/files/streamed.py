"""A live model that holds one layer in memory at a time, for models larger than memory."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rap_env.errors import InvalidRequestError, UnsupportedModelError, check_name
from rap_env.models.device import choose_device, choose_dtype, take_library_workspace
from rap_env.models.families.adapter import read_config
from rap_env.models.files.pruned_checkpoint import PRUNED_FILE
from rap_env.models.files.sources import load_tokenizer, locate
from rap_env.models.files.weight_files import open_weights
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.residency import RESIDENCIES, Residency
from rap_env.models.weights.tensors import StoredTensor
from rap_env.models.weights.transfers import DoubleBuffer, aligned
from rap_env.models.weights.weight_levels import embeddings_item
from rap_env.paths import cache_dir
from rap_env.plan import Plan

log = logging.getLogger(__name__)


def stream_llm(
    model: str | os.PathLike[str],
    *,
    max_memory_bytes: int,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "bf16",
) -> StreamedLLM:
    """Open a causal language model whose layers are read from its files when they are called.

    Embeddings, last norm and head stay in memory, and one layer at a time; on a GPU two, of which
    one is read while it computes with the other. Scores equal those of
    `load_llm` bit for bit, with the same fingerprint, so that stored scores serve both.

    Args:
        model: As for `load_llm`; its weights must be in safetensors files.
        max_memory_bytes: Most bytes on the device for weights and for the tensors that scorers
            compute with them; the memory of Python and its libraries is not included.
        device: As for `load_llm`.
        dtype: As for `load_llm`.
        weights: ``"bf16"``; other formats of `load_llm` cannot be read layer by layer.

    Raises:
        InvalidRequestError: The cap is too small; the message states the minimum.
        UnsupportedModelError: The family is not known, the weights do not fit the config, or
            it is a pruned checkpoint.
        UnknownNameError: The alias, device or dtype does not exist.
        ModelNotAvailableError: The model is not available, or not in safetensors files.
        ChecksumError: A file is damaged.
        StorageFullError: The disk is full.
    """
    if weights != "bf16":
        raise UnsupportedModelError(
            f"weights={weights!r} cannot be streamed, only 'bf16' (unquantised weights in dtype): "
            "pass weights='bf16', or load the model with load_llm()."
        )
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    found = locate(model)
    if (found.folder / PRUNED_FILE).is_file():
        raise UnsupportedModelError(
            f"{found.folder} is a pruned checkpoint, which cannot be streamed: use load_llm(), or "
            "stream the dense model from which it was made."
        )
    config = read_config(found.folder)
    log.info("Opening %s in %s on %s, one layer at a time", found.name, kind, place)
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
    """Remove a folder, unless this process is a fork of the one that created it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class _StoredParameter:
    """A parameter in a file, its place in the model, and its placeholder until it is read."""

    module: nn.Module
    attribute: str
    stored: StoredTensor
    placeholder: nn.Parameter

    def fill(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.attribute, parameter)

    def read(self, device: torch.device) -> None:
        self.fill(_fixed(self.stored.read(device)))


@dataclass
class _Held:
    """The layer in memory, and the number of layers read so far; shared by all views."""

    number: int | None = None
    reads: int = 0


class StreamedLLM(ElasticLLM):
    """An `ElasticLLM` that holds one decoder layer at a time; made by `stream_llm`.

    A layer is read when one of its modules is called. Everything that calls the model therefore
    works, but slowly: generation reads the kept layers once for each token. Scoring runs as many
    masks through a loaded layer as `max_memory_bytes` allows. Parameters of layers that are not in
    memory are on the meta device; the model cannot be saved.

    Args:
        model: The model that `open_weights` returned.
        stored: The stored tensor of each parameter on the meta device, by name.
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
        self._layers, resident = self._parameters()
        self._workspace_bytes = take_library_workspace(device, self.dtype)
        self._check_cap(resident)
        self._load_resident(resident)
        self._buffer = DoubleBuffer(self._layer_bytes, device) if device.type == "cuda" else None
        self._live.embeddings = embeddings_item(self.model)  # only now tied weights are one tensor
        for number, parameters in enumerate(self._layers):
            for module in {id(entry.module): entry.module for entry in parameters}.values():
                module.register_forward_pre_hook(partial(_hold, weakref.ref(self), number))

    @property
    def spare_bytes(self) -> int:
        """Bytes of the cap that weights, stubs and the library's workspace do not use."""
        used = self._weight_bytes + self._workspace_bytes + sum(self.facts.stub_bytes)
        return self.max_memory_bytes - used

    @property
    def layer_reads(self) -> int:
        """Number of layers read from files so far."""
        return self._held.reads

    def set_residency(self, residency: Residency) -> None:
        """Accept only ``"resident"``, which changes nothing: streamed layers are always evicted."""
        check_name("residency", residency, RESIDENCIES)
        if residency != "resident":
            raise UnsupportedModelError(
                f"residency={residency!r} has no effect on a streamed model, which holds one layer "
                "at a time whatever its mask is; load the model with load_llm()."
            )

    def _check_levels(self, plan: Plan) -> None:
        super()._check_levels(plan)
        if plan.weights or plan.embeddings != "native":
            raise UnsupportedModelError(
                "The weights of a streamed model are read from its files at every use, so that "
                "they have no other levels; load the model with load_llm()."
            )

    def load_layer(self, number: int) -> None:
        """Load the weights of a layer, and evict those of the layer in memory."""
        if number == self._held.number:
            return
        self._evict()
        self._held.number = number
        self._held.reads += 1
        try:
            self._read_layer(self._layers[number])
        except BaseException:
            self._evict()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read_layer(self, entries: list[_StoredParameter]) -> None:
        if self._buffer is None:
            for entry in entries:
                entry.read(self._device)
            return

        def write(host: torch.Tensor) -> None:
            for entry, tensor in zip(entries, _tensors(host, entries), strict=True):
                entry.stored.read_into(tensor)

        filled = self._buffer.fill(write)
        for entry, tensor in zip(entries, _tensors(filled, entries), strict=True):
            entry.fill(_fixed(tensor))

    def _read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._stored[name].read(torch.device("cpu")) if tensor.is_meta else tensor

    def _evict(self) -> None:
        if self._held.number is not None:
            for entry in self._layers[self._held.number]:
                entry.fill(entry.placeholder)
            self._held.number = None

    def _parameters(self) -> tuple[list[list[_StoredParameter]], list[_StoredParameter]]:
        """The parameters of each layer, (L,), and those that stay in memory."""
        numbers = {
            id(module): number
            for number, layer in enumerate(self.adapter.layers(self.model))
            for module in layer.modules()
        }
        layers: list[list[_StoredParameter]] = [[] for _ in range(self.adapter.num_layers)]
        resident: list[_StoredParameter] = []
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._stored:
                path, _, attribute = name.rpartition(".")
                module = self.model.get_submodule(path)
                entry = _StoredParameter(module, attribute, self._stored[name], parameter)
                number = numbers.get(id(module))
                (resident if number is None else layers[number]).append(entry)
        return layers, resident

    def _check_cap(self, resident: list[_StoredParameter]) -> None:
        """Compute the bytes of the weights, and reject a cap below it."""
        stay = {entry.stored for entry in resident}
        reading = max((stored.reading_bytes for stored in stay), default=0)
        self._layer_bytes = max(
            sum(aligned(entry.stored.nbytes) for entry in layer) for layer in self._layers
        )
        if self._device.type == "cuda":  # both are in memory; the host reads into its own
            reading = max(reading, 2 * self._layer_bytes)
        else:
            for layer in self._layers:
                held = sum(entry.stored.nbytes for entry in layer)
                reading = max(reading, held + max(entry.stored.reading_bytes for entry in layer))
        loaded = sum(p.nbytes for p in self.model.parameters() if not p.is_meta)
        self._weight_bytes: int = loaded + sum(stored.nbytes for stored in stay) + reading
        if self.max_memory_bytes <= self._weight_bytes:
            layers = "two layers" if self._device.type == "cuda" else "one layer"
            raise InvalidRequestError(
                f"max_memory_bytes={self.max_memory_bytes:,} is too small for {self.name}: "
                f"embeddings, head and {layers} take {self._weight_bytes:,} bytes; give more than "
                "that, for hidden states."
            )

    def _load_resident(self, parameters: list[_StoredParameter]) -> None:
        """Read parameters outside of layers (tied ones once), and copy the rest to the device."""
        shared: dict[StoredTensor, list[_StoredParameter]] = defaultdict(list)
        for entry in parameters:
            shared[entry.stored].append(entry)
        for group in shared.values():
            parameter = _fixed(group[0].stored.read(self._device))
            for entry in group:
                entry.fill(parameter)
        # A file may contain a tied parameter twice; transformers ties the two if they are equal.
        for target, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            first, second = (self.model.get_parameter(name) for name in (source, target))
            if first is not second and torch.equal(first, second):
                path, _, name = target.rpartition(".")
                setattr(self.model.get_submodule(path), name, first)
        for path, module in self.model.named_modules():
            for name, tensor in module.named_parameters(recurse=False):
                if not tensor.is_meta and f"{path}.{name}" not in self._stored:
                    # A copy, even on a CPU, where transformers left a view of the mapped file.
                    copy = tensor.detach().to(self._device, copy=True)
                    setattr(module, name, nn.Parameter(copy, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _tensors(buffer: torch.Tensor, entries: list[_StoredParameter]) -> Iterator[torch.Tensor]:
    """The tensors of a layer in a buffer, one after the other."""
    offset = 0
    for stored in (entry.stored for entry in entries):
        part = buffer[offset : offset + stored.nbytes]
        yield part.view(stored.dtype).view(stored.shape)
        offset += aligned(stored.nbytes)


def _hold(llm: weakref.ref[StreamedLLM], number: int, *_: Any) -> None:
    streamed = llm()
    if streamed is not None:
        streamed.load_layer(number)
