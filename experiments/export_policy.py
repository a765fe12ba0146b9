"""``python -m experiments.export_policy``: a trained policy as a file for a live model.

Model, text and importance are those of the run, as its ``config.yaml`` says; it needs what the
run itself needed, such as its text, at the same place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.export import export_policy
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config, ExportPolicyConfig, as_config
from experiments.console import message, say
from experiments.contexts import build_context, frontier_artifact
from experiments.errors import ExperimentError
from experiments.launch import launch_reader
from rap_env.importance import Frontier
from rap_env.scoring.store import mask_key

FRONTIER_SUFFIX = ".frontier.json"


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
    context = build_context(settings)
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


if __name__ == "__main__":
    launch_reader("export_policy", ExportPolicyConfig, export)
