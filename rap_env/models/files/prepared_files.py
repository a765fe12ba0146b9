"""The file that holds what a model was prepared with: weights of few bits, and their costs.

`rap_env.importance.preparation` makes both in the cache. The file takes them to another
machine, where it is found beside the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError
from rap_env.memory import HasFacts, ModelFacts
from rap_env.models.files.sources import looks_like_path
from rap_env.paths import COSTS_FILE, LEVELS_FILE, calibrated_dir, prepared_dir

log = logging.getLogger(__name__)

SUFFIX = ".rap"
"""Of a file beside a model, by the model's name, that is found there."""


def write_prepared(costs: Path, out: str | os.PathLike[str]) -> None:
    """Write costs and levels of a prepared model into one file, for another machine.

    Args:
        costs: The file of the costs in the cache.
        out: The file to write.

    Raises:
        StorageFullError: The disk is full.
    """
    content = costs.read_bytes()
    provenance = _provenance(content)
    calibrated = calibrated_dir(provenance["fingerprint"], provenance["scoring"]["calibration"])
    with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.write(costs, COSTS_FILE)
        for own in (*costs.parent.glob(LEVELS_FILE), *sorted(calibrated.glob("*.safetensors"))):
            archive.write(own, own.name)
    _mark(costs.parent, content).touch()


def find_prepared(model: str | os.PathLike[str], llm: HasFacts) -> None:
    """Read the file of a prepared model that is beside a model's own file or folder, if any.

    Raises:
        ArtifactError: It is damaged, or no such file.
        StorageFullError: The disk is full.
    """
    path = Path(model).expanduser()
    name = path.stem if path.suffix == ".gguf" else path.name  # a folder may have a dot
    beside = path.with_name(f"{name}{SUFFIX}")
    if looks_like_path(model) and path.exists() and beside.is_file():
        _read_prepared(beside, llm.facts)


def _read_prepared(path: Path, facts: ModelFacts) -> None:
    """Copy what a file holds into the cache, once: a later preparation stays there."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(COSTS_FILE)
            provenance = _provenance(content)
            if provenance["fingerprint"] != facts.fingerprint:
                log.warning(
                    "%s is not used, because it was prepared from %s with other weights or another "
                    "dtype than %s (%s).",
                    path,
                    provenance["model"],
                    facts.name,
                    facts.dtype,
                )
                return
            folder = prepared_dir(facts.fingerprint)
            if _mark(folder, content).exists():
                return
            calibrated = calibrated_dir(facts.fingerprint, provenance["scoring"]["calibration"])
            for member in sorted(archive.namelist(), reverse=True):
                name = Path(member).name
                if name != COSTS_FILE:
                    own = (folder if name == LEVELS_FILE else calibrated) / name
                    with archive.open(member) as stored, atomic_write(own) as file:
                        shutil.copyfileobj(stored, file, 2**20)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged or no file of a prepared model ({error}); write it again with "
            "`rap prepare MODEL --out FILE`, or remove it."
        ) from error
    with atomic_write(folder / COSTS_FILE) as file:
        file.write(content)
    _mark(folder, content).touch()


def _provenance(costs: bytes) -> dict[str, Any]:
    """The provenance in a file of costs: model, fingerprint, text."""
    provenance: dict[str, Any] = json.loads(costs)["body"]["provenance"]
    return provenance


def _mark(folder: Path, costs: bytes) -> Path:
    """The empty file which tells that these costs were once in the folder of a prepared model."""
    return folder / f"{hashlib.sha256(costs).hexdigest()[:16]}.copied"
