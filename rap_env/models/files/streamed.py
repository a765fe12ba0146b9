"""A live model whose layers stay on disk, for models larger than memory."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from rap_env.errors import InvalidRequestError, UnsupportedModelError, check_name
from rap_env.models.device import choose_device, choose_dtype, take_library_workspace
from rap_env.models.families.adapter import read_config
from rap_env.models.files.pruned_checkpoint import PRUNED_FILE
from rap_env.models.files.sources import locate
from rap_env.models.files.weight_files import load_offloaded, load_tokenizer, offloaded_weights
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.residency import RESIDENCIES, Residency
from rap_env.models.weights.tensors import stored_dtype
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

    Embeddings, last norm and head stay in memory; accelerate reads the weights of each module in a
    layer when it is called, and frees them afterwards. Scores equal those of `load_llm` bit for
    bit, with the same fingerprint, so that stored scores serve both.

    Args:
        model: As for `load_llm`.
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
        ModelNotAvailableError: The model is not available.
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
    source = locate(model)
    if (source.folder / PRUNED_FILE).is_file():
        raise UnsupportedModelError(
            f"{source.folder} is a pruned checkpoint, which cannot be streamed: use load_llm(), or "
            "stream the dense model from which it was made."
        )
    read_config(source.folder)
    log.info("Opening %s in %s on %s, one layer at a time", source.name, kind, place)
    cache_dir().mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="converted-", dir=cache_dir()))
    try:
        llm = StreamedLLM(
            load_offloaded(source.folder, kind, place, work),
            load_tokenizer(source.folder),
            name=source.name,
            stored_dtype=stored_dtype(source.folder),
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


class StreamedLLM(ElasticLLM):
    """An `ElasticLLM` whose layers are on disk; made by `stream_llm`.

    Everything that calls the model works, but slowly: generation reads the kept layers once for
    each token. Scoring keeps the states of as many masks as `max_memory_bytes` allows. Parameters
    of layers are on the meta device; the model cannot be saved.

    Args:
        model: The model that `load_offloaded` returned.
        stored_dtype: The dtype of the weights in their files.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        stored_dtype: torch.dtype,
        max_memory_bytes: int,
    ) -> None:
        super().__init__(model, tokenizer, name=name)
        self.max_memory_bytes = max_memory_bytes
        self._workspace_bytes = take_library_workspace(self.device, self.dtype)
        layers = self.adapter.layers(model)
        self._weight_bytes: int = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        self._weight_bytes += max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
        if stored_dtype != self.dtype:
            largest = max(p.numel() for layer in layers for p in layer.parameters())
            self._weight_bytes += largest * stored_dtype.itemsize
        if max_memory_bytes <= self._weight_bytes:
            raise InvalidRequestError(
                f"max_memory_bytes={max_memory_bytes:,} is too small for {name}: embeddings, head "
                f"and one layer take {self._weight_bytes:,} bytes; give more than that, for hidden "
                "states."
            )

    @property
    def spare_bytes(self) -> int:
        """Bytes of the cap that weights and the library's workspace do not use."""
        return self.max_memory_bytes - self._weight_bytes - self._workspace_bytes

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

    def _read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        stored: torch.Tensor = offloaded_weights(self.model)[name]
        return stored.to(tensor.dtype)
