"""``python -m experiments.export_policy``: export a trained policy for the runtime.

    python -m experiments.export_policy run=runs/learning/train/rap-s0 out=rap.safetensors

Model, calibration text and importance are read from the run's ``config.yaml``, so the files
that the run needed must still exist at the same paths.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.export import export_policy
from experiments.config import Config, as_config
from experiments.config.program_settings import ExportPolicyConfig
from experiments.contexts import build_context
from experiments.study.console import ExperimentError, message, run_with_settings, say
from experiments.study.run_folder import RunFolder


def export(config: ExportPolicyConfig) -> Path:
    """Write a run's policy.

    Returns:
        The path of the policy.
    """
    settings = settings_of(Path(config.run))
    context = build_context(settings)
    file, path = export_policy(config.run, context), Path(config.out)
    file.save(path)
    say(f"{path}: {path.stat().st_size:,} bytes, {file.provenance['steps']:,} steps.")
    return path


def settings_of(folder: Path) -> Config:
    """Return the settings of a training run, with the current location of its comparison.

    Raises:
        ExperimentError: There is no such run, or its settings cannot be read.
    """
    written = RunFolder(folder).settings()
    if written is None:
        raise ExperimentError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        config = as_config(OmegaConf.merge(OmegaConf.structured(Config), written))
    except OmegaConfBaseException as error:
        raise ExperimentError(
            f"{folder / 'config.yaml'} has settings that this version does not support: "
            f"{message(error)}"
        ) from None
    train = folder.resolve().parent
    if train.name != "train":  # the run was moved alone: keep the recorded location
        return config
    return replace(config, runs_dir=str(train.parent.parent), name=train.parent.name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run_with_settings(ExportPolicyConfig, export)
