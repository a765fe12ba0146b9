"""Packed folders of models that were shipped unquantised: quantised once, then cached."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import digest
from rap_env.llm.adapter import adapter_for
from rap_env.llm.model_folder import MANIFEST, made_once, models_dir
from rap_env.llm.packed_folder import PACKED_FILE
from rap_env.llm.packing import PackedLevel
from rap_env.llm.weight_files import load_weights
from rap_env.llm.weight_levels import block_items, embeddings_item
from rap_env.llm.weights import DTYPES, read_header, weights_of

log = logging.getLogger(__name__)

_VERSION = 1
"""Part of a folder's name: increase it when quantisers give other values."""

_EMBEDDINGS: PackedLevel = "int8"  # at 4 bits they cost more than all blocks together
_OTHER_FILES = (".json", ".txt", ".model", ".jinja")


def quantised_folder(source: Path, level: PackedLevel) -> Path:
    """The packed folder of a model, for `load_native`; made at the first call.

    All blocks are at `level`, and embeddings with head at int8.

    Args:
        source: The folder of the unquantised model.
        level: ``"int8"`` or ``"int4"``.

    Raises:
        UnsupportedModelError: As for `load_weights`.
        StorageFullError: The disk is full; nothing remains of the attempt.
    """

    def make(folder: Path) -> dict[str, Any]:
        log.info("Quantising %s to %s (once)", source, level)
        model = load_weights(source, _stored_dtype(source))
        _quantise(model, level)
        _save(model, source, folder)
        return {"file": source.name, "level": level}

    content = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(source)]
    key = digest([str(source.resolve()), content])[:16]
    return made_once(models_dir() / f"{level}-{key}-v{_VERSION}", make)


def _files(source: Path) -> list[Path]:
    weights = [*source.glob("*.safetensors"), *source.glob("*.bin")]
    return sorted([source / "config.json", *weights])


def _stored_dtype(source: Path) -> torch.dtype:
    """The dtype of most weights of a folder."""
    headers = (read_header(path).values() for path in source.glob("*.safetensors"))
    kinds = Counter(entry["dtype"] for header in headers for entry in header)
    return DTYPES.get(kinds.most_common(1)[0][0], torch.float32) if kinds else torch.float32


def _quantise(model: Any, level: PackedLevel) -> None:
    """Put packed modules into a model that was just loaded, one block after the other."""
    items = list(block_items(model, adapter_for(model.config).sites(model)))
    levels = dict.fromkeys(items, level) | {embeddings_item(model): _EMBEDDINGS}
    for item, wanted in levels.items():
        if wanted in item.levels:
            item.quantise(wanted)
            item.put(wanted)


def _save(model: Any, source: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    stored = {name: tensor.detach().contiguous() for name, tensor in weights_of(model)}
    save_file(stored, folder / PACKED_FILE, {"format": "pt"})
    for path in source.iterdir():
        index = path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _OTHER_FILES and not index and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
