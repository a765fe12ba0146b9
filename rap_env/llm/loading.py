"""From a name, a folder or a file to a live model."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rap_env.errors import (
    ModelNotAvailableError,
    UnknownNameError,
    UnsupportedModelError,
)
from rap_env.llm import default_model
from rap_env.llm.config import read_config
from rap_env.llm.device import (
    bound_kernel_caches,
    choose_device,
    choose_dtype,
    keep_freed_memory,
)
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.gguf_file import converted_gguf
from rap_env.llm.hub import hub_folder
from rap_env.llm.progress import transformers_bars
from rap_env.llm.single import take_short_ways
from rap_env.llm.weight_files import readable, refuse_missing, require_all_files
from rap_env.paths import cache_dir

log = logging.getLogger(__name__)

ALIASES = (default_model.ALIAS,)
PRUNED_FILE = "rap_pruned.json"  # as in surgery, which imports all of transformers
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector.

    Importing transformers makes a million objects that stay; looking among them for garbage
    again and again took a fifth of the time of loading.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def load_llm(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
) -> ElasticLLM:
    """Load a causal language model, ready for masks: in evaluation mode, without gradients.

    Args:
        model: The alias ``"smollm2-135m"`` (or ``"smollm2-135m@hub"``, ``"smollm2-135m@pypi"``,
            see `rap_env.llm.default_model`), a hub id (``"org/name"`` or ``"org/name@revision"``),
            a folder that transformers or `save_pruned` saved, or a ``.gguf`` file.
        device: ``"auto"`` (CUDA if there is any), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        dtype: ``"auto"`` (bfloat16 where that was measured to be clearly faster, else float32;
            see `rap_env.llm.device.choose_dtype`), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. A pruned checkpoint has its own.
        quantization: None; nothing else is supported yet.

    Returns:
        A model of its own; see `shared_llm` for one that the process shares.

    Raises:
        UnknownNameError: The alias, device or dtype does not exist.
        ModelNotAvailableError: The model is neither on this machine nor to be had.
        UnsupportedModelError: The family is not known (nothing was loaded), the weights do not
            fit the config, or a quantisation was asked for.
        ChecksumError: A file is damaged.
        StorageFullError: The disk is full.
    """
    if quantization is not None:
        raise UnsupportedModelError(
            f"quantization={quantization!r} is not supported yet; leave it out (None)."
        )
    keep_freed_memory()
    bound_kernel_caches()
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    found = locate(model)
    if (found.folder / PRUNED_FILE).is_file():
        return _load_pruned(found.folder, place, None if dtype == "auto" else kind)
    read_config(found.folder)
    log.info("Loading %s in %s on %s", found.name, kind, place)
    loaded = _load_weights(found.folder, kind).to(place)
    take_short_ways(loaded)
    tokenizer = load_tokenizer(found.folder)
    return ElasticLLM(loaded, tokenizer, name=found.name, folder=found.folder)


_shared: dict[tuple[str, ...], ElasticLLM] = {}
_shared_lock = threading.Lock()


def shared_llm(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    max_memory_bytes: int | None = None,
) -> ElasticLLM:
    """The model that this process shares among all who ask with the same arguments.

    It is loaded at the first call. A forked process goes on with what its parent had loaded (on
    the CPU without a copy in memory); a spawned one loads its own. Whoever uses it applies masks
    with ``with llm.masked(mask):`` and leaves it as it was.

    Args and errors are those of `load_llm`; with `max_memory_bytes`, those of `stream_llm`.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    settings = (os.environ.get(default_model.SOURCE_VARIABLE, ""), str(cache_dir()))
    name = os.fspath(model)
    if _looks_like_path(model):
        name = str(Path(name).expanduser().resolve())
    key = (name, str(place), str(kind), str(quantization), str(max_memory_bytes), *settings)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = (
                load_llm(model, device=device, dtype=dtype, quantization=quantization)
                if max_memory_bytes is None
                else _stream(model, device, dtype, max_memory_bytes)
            )
        return _shared[key]


def _stream(
    model: str | os.PathLike[str], device: str, dtype: str, max_memory_bytes: int
) -> ElasticLLM:
    from rap_env.llm.streamed import stream_llm  # it builds on this module

    return stream_llm(model, max_memory_bytes=max_memory_bytes, device=device, dtype=dtype)


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Located:
    """Where a model lies on this machine.

    Attributes:
        folder: A folder in transformers' format.
        name: What to call it in results; says the source where there is more than one.
    """

    folder: Path
    name: str


def locate(model: str | os.PathLike[str]) -> Located:
    """Find a model on this machine, fetching or converting it where needed.

    An alias comes before a folder of that name, a folder before a hub id.

    Args:
        model: As for `load_llm`.

    Raises:
        UnknownNameError: It is no alias, no path and no hub id.
        ModelNotAvailableError: It is neither on this machine nor to be had.
        UnsupportedModelError: Its family is not known.
        ChecksumError: A file is damaged.
        StorageFullError: The disk is full.
    """
    name = os.fspath(model)
    alias, _, source = name.partition("@")
    if alias in ALIASES:
        folder, source = default_model.default_model_folder(source or None, read_config)
        return Located(folder, f"{alias}@{source}")
    if _looks_like_path(model):
        return _locate_path(Path(name).expanduser())
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise UnknownNameError(
            "model",
            name,
            ALIASES,
            "A hub model is written 'organisation/name', a folder or GGUF file by its path.",
        )
    return Located(hub_folder(match["repo"], match["revision"], read_config), name)


def _looks_like_path(model: str | os.PathLike[str]) -> bool:
    name = os.fspath(model)
    if name.partition("@")[0] in ALIASES:
        return False
    if not isinstance(model, str) or name.startswith((".", "~", "/")):
        return True
    written = name.endswith(".gguf") or name.count("/") > 1
    return written or (name != "" and Path(name).exists())


def _locate_path(path: Path) -> Located:
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.is_file():
        return Located(converted_gguf(path.resolve()), path.stem)
    raise ModelNotAvailableError(
        f"There is no model folder or GGUF file {path}; check the path, or use a known alias "
        f"({', '.join(ALIASES)}) or a hub id."
    )


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    """The model itself, on the CPU; every weight of it must be in the files."""
    from transformers import AutoModelForCausalLM

    require_all_files(folder)
    with transformers_bars(shown=False), readable(folder):
        # The attention is left to transformers: sdpa where the family has it, else eager.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one sentence
        )
    model, report = loaded
    refuse_missing(folder, report)
    if wrong := sorted(report["mismatched_keys"]):
        raise UnsupportedModelError(
            f"{folder} holds {len(wrong)} tensors that do not fit its config: {wrong[0][0]!r} has "
            f"shape {tuple(wrong[0][1])}, and {tuple(wrong[0][2])} was expected."
        )
    return model.eval().requires_grad_(False)


def _load_pruned(folder: Path, device: torch.device, dtype: torch.dtype | None) -> ElasticLLM:
    from rap_env.llm.surgery import load_pruned

    llm = load_pruned(folder, device=str(device))
    if dtype not in (None, llm.dtype):
        raise UnsupportedModelError(
            f"The pruned checkpoint {folder} is in {llm.dtype}, and {dtype} was asked for; leave "
            "dtype at 'auto', or load the dense model in that dtype and save it pruned again."
        )
    llm.model.requires_grad_(False)
    return llm


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, set up for generation.

    Raises:
        ModelNotAvailableError: There is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotAvailableError(
            f"{folder} has no tokenizer that transformers can read ({error}); save it there with "
            "tokenizer.save_pretrained()."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches of unequal length need one
    tokenizer.padding_side = "left"  # where generation goes on from the right end
    return tokenizer
