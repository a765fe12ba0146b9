"""What all programs share: Hydra, and errors of one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config import Config, as_config, register
from experiments.errors import ExperimentError
from experiments.threads import set_threads
from rap_env.errors import RapError

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
EXIT_CODE = 2
"""Exit code of a mistake that the message explains."""

EXTRAS = {
    "hydra/sweeper/optuna": "sweeps",
    "hydra/launcher/submitit": "slurm",
    "hydra/launcher/ray'": "ray",
}
"""Extras of this package by how Hydra names the plugin that they bring."""

Stage = Callable[[Config, Path], Any]

register()  # on import, so that the worker processes of a parallel sweep have it too


def launch(stage: str, run: Stage) -> None:
    """Compose the settings with Hydra and run one stage, or a sweep of it.

    Args:
        stage: Name of the program, and of its file in ``conf/``.
        run: Called with the settings and the run folder. A number that it returns is what a
            sweep with an optimiser minimises.
    """

    @hydra.main(version_base=None, config_path=str(CONF_DIR), config_name=stage)
    def main(node: DictConfig) -> float | None:
        try:
            config = as_config(node)
            if config.threads is None and has_neighbours(HydraConfig.get()):
                config = replace(config, threads=1)
            if stage != "report":  # a report runs no model
                set_threads(config)
            result = run(config, Path(HydraConfig.get().runtime.output_dir))
            return result if isinstance(result, float) else None
        except RapError as error:
            if HydraConfig.get().mode == RunMode.RUN:
                fail(str(error))
            # In a sweep the other jobs go on first, and Hydra hands the error back then. A
            # plain message survives the trip from a worker process.
            raise ExperimentError(str(error)) from None

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a traceback
    try:
        main()
    except (RapError, HydraException, OmegaConfBaseException) as error:
        fail(_with_extra(message(error)))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; the same command goes on from here.\n")
        sys.exit(130)


def has_neighbours(hydra: Any) -> bool:
    """Whether jobs run side by side, as with every launcher but Hydra's own.

    Each job then gets one thread of torch; those that would measure how many are fastest
    would measure each other.
    """
    return bool(
        hydra.mode == RunMode.MULTIRUN and not hydra.launcher._target_.endswith(".BasicLauncher")
    )


def _with_extra(message: str) -> str:
    """The message, with what to install where a plugin of Hydra is missing."""
    for plugin, extra in EXTRAS.items():
        if plugin in message:
            return f'{message}\nIt comes with an extra: pip install -e ".[{extra}]"'
    return message


def fail(sentence: str) -> NoReturn:
    """Say what is wrong, and end with the exit code of a mistake."""
    sys.stderr.write(f"Error: {sentence}\n")
    sys.exit(EXIT_CODE)


def message(error: BaseException) -> str:
    """The message, with the cause that names the key where Hydra hides it."""
    parts = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip() not in parts[0]:
        parts.append(str(cause).strip())
    return "\n".join(parts)
