"""Packed folders of models that were shipped unquantised: quantised once, then cached."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

from rap_env.artifacts import digest
from rap_env.levels import WeightLevel
from rap_env.models.files.model_folder import MANIFEST, made_once, models_dir
from rap_env.models.files.packed_folder import PACKED_FILE
from rap_env.models.files.weight_files import load_tokenizer, load_weights
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.self_written import self_written, start_token
from rap_env.models.weights.packing import PackedLevel
from rap_env.models.weights.tensors import stored_dtype, weights_of
from rap_env.plan import EMBEDDINGS, Plan

_VERSION = 1
"""Part of a folder's name: increase it when quantisers give other values."""

_DURATIONS = {"int8": "a few seconds", "int4": "minutes: the model writes text to calibrate on"}
_CALIBRATION_TOKENS, _WINDOW_TOKENS, _SEED = 10_240, 256, 0
_EMBEDDINGS: WeightLevel = "int8"  # at 4 bits they cost more than all blocks together
_OTHER_FILES = (".json", ".txt", ".model", ".jinja")


def quantised_folder(source: Path, level: PackedLevel) -> Path:
    """The packed folder of a model, for `load_native`; made at the first call.

    All blocks are at `level`, and embeddings with head at int8. Int4 weights are calibrated on text
    that the model writes itself.

    Args:
        source: The folder of the unquantised model.
        level: ``"int8"`` or ``"int4"``.

    Raises:
        UnsupportedModelError: As for `load_weights`.
        StorageFullError: The disk is full; nothing remains of the attempt.
    """
    content = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(source)]
    key = digest([str(source.resolve()), content])[:16]
    return made_once(
        models_dir() / f"{level}-{key}-v{_VERSION}",
        functools.partial(_fill, source, level),
        f"Quantising {source} to {level} (once; {_DURATIONS[level]})",
        logging.WARNING,
    )


def _fill(source: Path, level: PackedLevel, folder: Path) -> dict[str, Any]:
    """Write a quantised model into an empty folder."""
    llm = _quantised(source, level)
    _save(llm.model, source, folder)
    return {"file": source.name, "level": level}


def _files(source: Path) -> list[Path]:
    weights = [*source.glob("*.safetensors"), *source.glob("*.bin")]
    return sorted([source / "config.json", *weights])


def _quantised(source: Path, level: PackedLevel) -> ElasticLLM:
    """The model of a folder, with packed modules in place."""
    tokenizer = load_tokenizer(source)
    llm = ElasticLLM(load_weights(source, stored_dtype(source)), tokenizer, name=source.name)
    if level == "int4" and start_token(llm) is not None:
        tokens = min(_WINDOW_TOKENS, llm.adapter.max_positions - 1)
        calibrate(llm, self_written(llm, _CALIBRATION_TOKENS // tokens, tokens, _SEED))
    facts = llm.facts
    levels = facts.blocks_at(level)
    if _EMBEDDINGS in facts.embedding_levels:
        levels[EMBEDDINGS] = _EMBEDDINGS
    llm.apply(Plan.of(levels))
    return llm


def _save(model: Any, source: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    stored = {name: tensor.detach().contiguous() for name, tensor in weights_of(model)}
    save_file(stored, folder / PACKED_FILE, {"format": "pt"})
    for path in source.iterdir():
        index = path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _OTHER_FILES and not index and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
