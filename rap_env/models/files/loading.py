"""Load a live model: a new one, or one that the process shares."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from rap_env.errors import UnsupportedModelError, check_name
from rap_env.models.caches.attention import speed_up_decoding
from rap_env.models.device import (
    DTYPES,
    bound_kernel_caches,
    choose_device,
    choose_dtype,
    free_memory_early,
    keep_freed_memory,
    return_freed_memory,
)
from rap_env.models.families.families import read_config
from rap_env.models.files.model_folder import in_child
from rap_env.models.files.prepared_files import find_prepared
from rap_env.models.files.pruned_checkpoint import PRUNED_FILE, load_pruned
from rap_env.models.files.sources import TINY_MODELS, locate, looks_like_path
from rap_env.models.files.weight_files import (
    files_key,
    has_all,
    is_packed,
    load_native,
    load_tokenizer,
    load_weights,
    model_without_weights,
    tensors_to_read,
)
from rap_env.models.live.calibration import (
    calibrate_on_own_text,
    use_prepared_levels,
    use_text,
)
from rap_env.models.live.calibration_text import calibration_windows, packaged_windows
from rap_env.models.live.elastic import ElasticLLM, LevelFiles
from rap_env.models.live.lean_llama import LeanLlama, lean_config
from rap_env.models.weights.packed_modules import PackedModule, from_matrices, skeleton
from rap_env.models.weights.packing import choose_packed_dtype
from rap_env.models.weights.tensors import StoredTensor, stored_tensors
from rap_env.paths import cache_dir

WEIGHTS = ("native", "bf16")
"""Formats in which `load_llm` loads weights."""

log = logging.getLogger(__name__)


def load_llm(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "native",
    lean: bool = False,
    on_demand: bool = False,
    quick_levels: bool = False,
    before_weights: Callable[[int], object] | None = None,
) -> ElasticLLM:
    """Load a causal language model, ready for masks: in evaluation mode, without gradients.

    Args:
        model: The alias ``"smollm2-135m"`` (see `models.files.sources`), a hub id
            (``"org/name"`` or ``"org/name@revision"``), a folder that transformers or
            `save_pruned` wrote, or a ``.gguf`` file.
        device: ``"auto"`` (CUDA if there is any), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dtype: ``"auto"`` (bfloat16, or float16 on older GPUs, where the processor has
            instructions for it, else float32; see `rap_env.models.device.choose_dtype`, and
            for packed weights `rap_env.models.weights.packing.choose_packed_dtype`),
            ``"float32"``, ``"bfloat16"`` or ``"float16"``. A pruned checkpoint has its own.
        weights: ``"native"`` keeps a GGUF file's own bits, and is ``"bf16"`` for all other
            sources; ``"bf16"`` unquantises to `dtype`.
        lean: Use `models.live.lean_llama` where it can stand in for transformers' model
            (Llama and Qwen2 models on a CPU). The process takes about 130 MiB less and
            the model serves in the same way, bit for bit, but runs no block alone and has no
            ``generate``.
        on_demand: Leave the weights of all blocks in the files. The model's plan removes every
            block at first, and its residency is ``"drop"``: a block is read when a plan needs
            it, and freed when a plan does not. Embeddings and head are in memory if they are
            packed; else some of their rows are read at a time. A pruned checkpoint is loaded
            whole, and so is an unquantised model whose files have other tensors than
            transformers' model, such as single experts.
        quick_levels: Whether quick levels of a prepared model are used, as a server does, and
            not only thorough ones, as environments and studies do.
        before_weights: Called with an estimate of the bytes that loading (and
            `set_residency`) still takes at its peak, before the tokenizer is read and again,
            closer, before the weights are; an error that it raises ends the loading. Not for
            a model that is loaded on demand.

    Returns:
        A new model; see `shared_llm` for one that the process shares.

    Raises:
        UnknownNameError: The alias, device, dtype or format of weights does not exist.
        ModelNotAvailableError: The model is not on this machine and cannot be downloaded.
        UnsupportedModelError: The family is not known (nothing was loaded), the weights do
            not fit the config, or the folder does not have them in that format.
        ChecksumError: A file is damaged.
        StorageFullError: The disk is full.
    """
    llm = _load(
        model, device, dtype, weights, lean=lean, on_demand=on_demand, before_weights=before_weights
    )
    find_prepared(model, llm)
    use_prepared_levels(llm, quick=quick_levels)
    return llm


def _load(
    model: str | os.PathLike[str],
    device: str,
    dtype: str,
    weights: str = "native",
    *,
    lean: bool = False,
    on_demand: bool = False,
    again: bool = False,
    before_weights: Callable[[int], object] | None = None,
) -> ElasticLLM:
    """Load a model without what was prepared for it.

    Args:
        model: As for `load_llm`, as are the others.
        device: Device.
        dtype: Dtype.
        weights: Format of the weights.
        lean: Whether the lean model may be used.
        on_demand: Whether blocks stay in the files.
        again: Whether this process has loaded it before: nothing is logged, and there is no
            tokenizer.
        before_weights: Called with the bytes that loading still takes.
    """
    free_memory_early()  # what loading frees would leave the heap full of holes
    bound_kernel_caches()
    found = _find(model, device, dtype, weights)
    if (found.folder / PRUNED_FILE).is_file():
        if on_demand:
            log.warning("%s is loaded whole, because it is a pruned checkpoint", found.name)
        if before_weights is not None:
            before_weights(2 * _bytes_of(stored_tensors(found.folder)))
        own = None if dtype == "auto" else found.dtype
        return load_pruned(found.folder, device=str(found.device), dtype=own)
    loader = _choose_loader(found, lean=lean, on_demand=on_demand)
    if before_weights is not None:
        size = _loading_bytes(found.folder, found.dtype, lean=loader.bare is not None)
        before_weights(size + _tokenizer_bytes(found.folder))
    # Before the weights, because it takes twice its size.
    tokenizer = None if again else load_tokenizer(found.folder)
    if before_weights is not None:
        if loader.bare is None:  # it imports all modules of transformers, but reads no weights
            model_without_weights(read_config(found.folder), found.dtype)
        return_freed_memory()
        before_weights(size)
    level = logging.DEBUG if again else logging.INFO
    log.log(level, "Loading %s in %s on %s", found.name, found.dtype, found.device)
    loaded = _read_weights(found, loader)
    llm = ElasticLLM(
        loaded, tokenizer, name=found.name, folder=found.folder, unread=loader.on_demand
    )
    short_dtype = str(found.dtype).removeprefix("torch.")
    llm.files_key = f"{files_key(found.folder)}-{short_dtype}-{transformers.__version__}"
    llm.as_stored = loader.by_tensor and found.device.type == "cpu"
    if loader.bare is not None:
        llm.calibrator = partial(_calibrate_lean, found.folder, short_dtype)
    else:
        llm.calibrator = calibrate_on_own_text
    # The others have none, and hashing their weights takes seconds.
    has_text = found.packed or found.name in TINY_MODELS
    if has_text and (windows := packaged_windows(llm)) is not None:
        use_text(llm, windows)  # so that scores and facts have its hash from the beginning
    return llm


def load_again(
    model: str | os.PathLike[str], device: str, dtype: str, files: LevelFiles = ()
) -> ElasticLLM:
    """Load a model that this process has loaded before, without a tokenizer.

    Args:
        model: As for `load_llm`.
        device: As for `load_llm`.
        dtype: As for `load_llm`; it may be another one than before.
        files: The `ElasticLLM.level_files` from before.

    Returns:
        The model, whose blocks and levels are in their files.
    """
    llm = _load(model, device, dtype, on_demand=True, again=True)
    use_prepared_levels(llm, quick=False)
    if files:
        for item, own in zip(llm.weight_items, files, strict=True):
            item.files.update(own)
    return llm


class _Found(NamedTuple):
    """A model's files, and where and in what they are loaded.

    Attributes:
        name: Name of the model.
        folder: Its folder.
        packed: Whether the folder has packed weights.
        device: The device.
        dtype: The dtype of what is not packed.
    """

    name: str
    folder: Path
    packed: bool
    device: torch.device
    dtype: torch.dtype


class _Loader(NamedTuple):
    """How a model is loaded.

    Attributes:
        bare: The lean model without weights that gets them; None for transformers' model.
        on_demand: Whether blocks stay in the files.
        by_tensor: Whether weights are read tensor by tensor, and not by transformers.
    """

    bare: LeanLlama | None
    on_demand: bool
    by_tensor: bool


def _find(model: str | os.PathLike[str], device: str, dtype: str, weights: str) -> _Found:
    """The files of a model; arguments and errors are those of `load_llm`."""
    check_name("format of weights", weights, WEIGHTS)
    check_name("dtype", dtype, ("auto", *DTYPES))
    place = choose_device(device)
    source = locate(model, packed=weights == "native")
    packed = is_packed(source.folder)
    kind = (choose_packed_dtype if packed else choose_dtype)(dtype, place)
    if packed and weights != "native":
        raise UnsupportedModelError(
            f"{source.folder} has only packed weights, so weights={weights!r} is not possible: "
            "leave weights at 'native', or give the model from which the folder was made."
        )
    return _Found(source.name, source.folder, packed, place, kind)


def _choose_loader(found: _Found, *, lean: bool, on_demand: bool) -> _Loader:
    """Decide how a model is loaded, without its weights; errors are those of `load_llm`."""
    config = lean_config(found.folder) if lean and found.device.type == "cpu" else None
    bare = None if config is None else LeanLlama(config, found.dtype)
    if bare is None:
        read_config(found.folder)
    elif not found.packed and not has_all(bare, found.folder):
        bare = None
    if on_demand and not found.packed:
        whole = model_without_weights(read_config(found.folder), found.dtype)
        if not has_all(whole, found.folder):
            log.warning("%s is loaded whole, because its files have other tensors", found.name)
            on_demand = False
    return _Loader(bare, on_demand, on_demand or bare is not None or found.packed)


def _read_weights(found: _Found, loader: _Loader) -> Any:
    """The model with its weights, or with those outside of the blocks, on its device."""
    if loader.by_tensor:
        unread = found.device if loader.on_demand else None
        loaded = load_native(found.folder, found.dtype, loader.bare, unread=unread)
    else:
        loaded = load_weights(found.folder, found.dtype)
    loaded = _moved(loaded, found.device)
    speed_up_decoding(loaded)
    return_freed_memory()
    keep_freed_memory()
    return loaded


def _calibrate_lean(folder: Path, dtype: str, llm: ElasticLLM) -> None:
    """Make levels of a lean model, which cannot run a block alone, with another one of its kind."""
    if llm.name in TINY_MODELS:
        _calibrate_folder(folder, dtype, llm.name)
    else:
        in_child(_calibrate_folder, folder, dtype, llm.name)
    use_text(llm, calibration_windows(llm))


def _calibrate_folder(folder: Path, dtype: str, name: str) -> None:
    llm = load_llm(folder, device="cpu", dtype=dtype, weights="native")
    llm.name = name
    calibrate_on_own_text(llm)


def _moved(model: Any, place: torch.device) -> Any:
    """Move a model to a device; a packed head that was tied to the embeddings stays so."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = isinstance(rows, PackedModule) and isinstance(head, PackedModule)
    tied = packed and rows.tensors()["weight_codes"] is head.tensors()["weight_codes"]
    model = model.to(place)
    if tied:  # torch moves the tensors of each module alone
        model.set_output_embeddings(from_matrices(skeleton(head), rows.matrices))
    return model


def _loading_bytes(folder: Path, dtype: torch.dtype, *, lean: bool) -> int:
    """Bytes that loading a folder's weights takes.

    Transformers maps unpacked files into memory beside the tensors that it makes of them, each
    of which `ElasticLLM.set_residency` copies. Else the largest tensor, that of the embeddings,
    takes a byte for each value once it is stored in fewer bits.
    """
    tensors = tensors_to_read(folder, dtype)
    if lean or is_packed(folder):
        largest = max((math.prod(tensor.shape) for tensor in tensors.values()), default=0)
        return sum(tensor.nbytes for tensor in tensors.values()) + largest
    return _bytes_of(tensors) + _bytes_of(stored_tensors(folder))


def _bytes_of(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of all tensors, and of the largest one once more."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return sum(sizes) + max(sizes, default=0)


def _tokenizer_bytes(folder: Path) -> int:
    """About what a tokenizer takes: 20 MiB for the 3.4 MiB of the default model's file."""
    return 6 * sum(path.stat().st_size for path in folder.glob("tokenizer.json"))


_shared: dict[tuple[str, ...], ElasticLLM] = {}
_shared_lock = threading.Lock()


def shared_llm(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "native",
) -> ElasticLLM:
    """The model that this process shares among all callers with the same arguments.

    It is loaded at the first call. A forked process continues to use the model that its
    parent loaded (on the CPU without a copy in memory); a spawned one loads its own. Apply
    masks with ``with llm.applied(mask):``, so that other users find the model unchanged.

    Args and errors are those of `load_llm`.
    """
    place = choose_device(device)
    name = os.fspath(model)
    if looks_like_path(model):
        name = str(Path(name).expanduser().resolve())
    key = (name, str(place), dtype, weights, str(cache_dir()))
    with _shared_lock:
        if key not in _shared:
            lean = name in TINY_MODELS  # their environments run them a hundred times a second
            _shared[key] = load_llm(model, device=device, dtype=dtype, weights=weights, lean=lean)
        return _shared[key]


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()  # a thread of the parent may hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
