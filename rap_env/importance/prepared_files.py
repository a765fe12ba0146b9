"""Where a model's levels and costs are once it is prepared, and the file that holds both.

Needs no torch. `rap_env.importance.preparation` makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.model_facts import HasFacts
from rap_env.paths import LEVELS_FILE, calibrated_dir, prepared_dir

SUFFIX = ".rap"
"""Of a file beside a model, by the model's name, that is found there."""

_COSTS = "costs.json"


def prepared_path(model: HasFacts) -> Path:
    """Path of the costs of a prepared model."""
    return prepared_dir(model.facts.fingerprint) / _COSTS


def prepared_costs(model: HasFacts) -> LevelCosts | None:
    """The costs of a model that was prepared on this machine, or from a file; else None.

    Raises:
        ArtifactError: They are damaged.
    """
    path = prepared_path(model)
    return LevelCosts.load(path, model) if path.is_file() else None


def write_prepared(costs: LevelCosts, out: str | os.PathLike[str]) -> None:
    """Write costs and levels of a prepared model into one file, for another machine.

    Raises:
        StorageFullError: The disk is full.
    """
    fingerprint, scoring = costs.provenance["fingerprint"], costs.provenance["scoring"]
    path = prepared_dir(fingerprint) / _COSTS
    calibrated = calibrated_dir(fingerprint, scoring["calibration"])
    with atomic_write(out) as file, zipfile.ZipFile(file, "w") as archive:
        archive.write(path, _COSTS)
        for own in (*path.parent.glob(LEVELS_FILE), *sorted(calibrated.glob("*.safetensors"))):
            archive.write(own, own.name)


def read_prepared(path: Path) -> None:
    """Copy what a file of `write_prepared` holds into the cache, unless it is there.

    Raises:
        ArtifactError: It is damaged, or no such file.
        StorageFullError: The disk is full.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            costs = archive.read(_COSTS)
            provenance = json.loads(costs)["body"]["provenance"]
            fingerprint = provenance["fingerprint"]
            own = prepared_dir(fingerprint) / _COSTS
            if own.is_file() and own.read_bytes() == costs:
                return
            calibrated = calibrated_dir(fingerprint, provenance["scoring"]["calibration"])
            for member in sorted(archive.namelist(), reverse=True):
                name = Path(member).name
                folder = own.parent if name == LEVELS_FILE else calibrated
                if name != _COSTS:
                    with archive.open(member) as stored, atomic_write(folder / name) as file:
                        shutil.copyfileobj(stored, file, 2**20)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged or no file of a prepared model ({error}); write it again with "
            "`rap prepare MODEL --out FILE`, or remove it."
        ) from error
    with atomic_write(own) as file:
        file.write(costs)


def find_prepared(model: str | os.PathLike[str]) -> None:
    """Read the file of a prepared model that is beside a model's own file or folder, if any."""
    beside = Path(model).expanduser().with_suffix(SUFFIX)
    if Path(model).expanduser().exists() and beside.is_file():
        read_prepared(beside)
