"""``python -m experiments.export_policy``: a trained policy as a file for a live model.

Model, text and importance are those of the run, as its ``config.yaml`` says; it needs what the
run itself needed, such as its text, at the same place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.export import export_policy
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config, as_config
from experiments.console import say
from experiments.contexts import frontier_artifact, open_bench
from experiments.errors import ExperimentError
from experiments.launch import CONF_DIR, fail, message
from rap_env.errors import RapError
from rap_env.importance import Frontier
from rap_env.scoring.store import mask_key

SUFFIX = ".safetensors"
FRONTIER_SUFFIX = ".frontier.json"


@dataclass
class ExportPolicyConfig:
    """What is exported, and where to."""

    run: str = MISSING
    """Folder of a training, such as runs/learning/train/rap-s0."""
    out: str = MISSING
    """The file to write; its name ends in .safetensors."""

    def __post_init__(self) -> None:
        """Refuse a name that `load_policy` would not know again."""
        if not self.out.endswith((SUFFIX, MISSING)):
            raise ExperimentError(f"out must end in {SUFFIX}, such as rap{SUFFIX}, not {self.out}.")


ConfigStore.instance().store(name="export_policy_schema", node=ExportPolicyConfig)


def export(config: ExportPolicyConfig) -> Path:
    """Write a run's policy and, if its profile has a frontier, the best known masks beside it.

    Args:
        config: What, and where to.

    Returns:
        The path of the policy.

    Raises:
        ExperimentError: There is no such run, or its settings cannot be read.
        RapError: As loading the model, the text or an artifact does, and as `export_policy` does.
    """
    settings = settings_of(Path(config.run))
    context = open_bench(settings)
    file, path = export_policy(config.run, context), Path(config.out)
    file.save(path)
    say(f"{path}: {path.stat().st_size:,} bytes, {file.provenance['steps']:,} steps.")
    if frontier_artifact(settings).exists():
        beside = path.with_suffix(FRONTIER_SUFFIX)
        thinned(context.frontier).save(beside)
        say(f"{beside}: {beside.stat().st_size:,} bytes, the best known masks.")
    return path


def settings_of(folder: Path) -> Config:
    """The settings of a training, with the places of its comparison as they are now.

    Raises:
        ExperimentError: There is no such run, or its settings cannot be read.
    """
    written = RunFolder(folder).settings()
    if written is None:
        raise ExperimentError(f"{folder} is no run's folder: it holds no config.yaml.")
    try:
        config = as_config(OmegaConf.merge(OmegaConf.structured(Config), written))
    except OmegaConfBaseException as error:
        raise ExperimentError(
            f"{folder / 'config.yaml'} has settings that this version does not know: "
            f"{message(error)}"
        ) from None
    train = folder.resolve().parent
    if train.name != "train":  # a run that was given another place: its own words must do
        return config
    return replace(config, runs_dir=str(train.parent.parent), name=train.parent.name)


def thinned(frontier: Frontier) -> Frontier:
    """The same table without the masks that are not the best of their counts."""
    scored = {mask_key(mask): frontier.scores[mask] for mask, _ in frontier.entries}
    settings = {**frontier.settings, "thinned_from_masks": frontier.evaluations}
    return replace(frontier, scored=scored, settings=settings)


@hydra.main(version_base=None, config_path=str(CONF_DIR), config_name="export_policy")
def _run(node: DictConfig) -> None:
    try:
        config = OmegaConf.to_object(node)
        assert isinstance(config, ExportPolicyConfig)  # conf/export_policy.yaml says so
        export(config)
    except RapError as error:  # here, since Hydra adds words of its own to what leaves a job
        fail(str(error))


def main() -> None:
    """Export; a mistake ends in one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a traceback
    try:
        _run()
    except (RapError, HydraException, OmegaConfBaseException) as error:
        fail(message(error))


if __name__ == "__main__":
    main()
