"""The file that holds what a model was prepared with: weights of few bits, and their costs.

`rap_env.importance.preparation` makes both in the cache. The file takes them to another
machine, where it is found beside the model.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError
from rap_env.paths import COSTS_FILE, LEVELS_FILE, calibrated_dir, prepared_dir

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
    calibrated = calibrated_dir(*_model_and_text(costs.read_bytes()))
    with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.write(costs, COSTS_FILE)
        for own in (*costs.parent.glob(LEVELS_FILE), *sorted(calibrated.glob("*.safetensors"))):
            archive.write(own, own.name)


def read_prepared(path: Path) -> None:
    """Copy what a file of `write_prepared` holds into the cache, unless it is there.

    Raises:
        ArtifactError: It is damaged, or no such file.
        StorageFullError: The disk is full.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            costs = archive.read(COSTS_FILE)
            fingerprint, calibration = _model_and_text(costs)
            own = prepared_dir(fingerprint) / COSTS_FILE
            if own.is_file() and own.read_bytes() == costs:
                return
            calibrated = calibrated_dir(fingerprint, calibration)
            for member in sorted(archive.namelist(), reverse=True):
                name = Path(member).name
                folder = own.parent if name == LEVELS_FILE else calibrated
                if name != COSTS_FILE:
                    with archive.open(member) as stored, atomic_write(folder / name) as file:
                        shutil.copyfileobj(stored, file, 2**20)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged or no file of a prepared model ({error}); write it again with "
            "`rap prepare MODEL --out FILE`, or remove it."
        ) from error
    with atomic_write(own) as file:
        file.write(costs)


def _model_and_text(costs: bytes) -> tuple[str, str]:
    """The fingerprint of the model and the hash of the text in a file of costs."""
    provenance = json.loads(costs)["body"]["provenance"]
    return provenance["fingerprint"], provenance["scoring"]["calibration"]


def find_prepared(model: str | os.PathLike[str]) -> None:
    """Read the file of a prepared model that is beside a model's own file or folder, if any."""
    path = Path(model).expanduser()
    name = path.stem if path.suffix == ".gguf" else path.name  # a folder may have a dot
    beside = path.with_name(f"{name}{SUFFIX}")
    if path.exists() and beside.is_file():
        read_prepared(beside)
