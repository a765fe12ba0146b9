"""What all programs share: Hydra, and errors of one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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

Stage = Callable[[Config, Path], Any]

register()  # on import, so that the worker processes of a parallel sweep have it too


def launch(stage: str, run: Stage) -> None:
    """Compose the settings with Hydra and run one stage, or a sweep of it.

    Args:
        stage: Name of the program, and of its file in ``conf/``.
        run: Called with the settings and the run folder.
    """

    @hydra.main(version_base=None, config_path=str(CONF_DIR), config_name=stage)
    def main(node: DictConfig) -> None:
        try:
            config = as_config(node)
            if stage != "report":  # a report runs no model
                set_threads(config)
            run(config, Path(HydraConfig.get().runtime.output_dir))
        except RapError as error:
            if HydraConfig.get().mode == RunMode.RUN:
                _fail(str(error))
            # In a sweep the other jobs go on first, and Hydra hands the error back then. A
            # plain message survives the trip from a worker process.
            raise ExperimentError(str(error)) from None

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing a traceback
    try:
        main()
    except (RapError, HydraException, OmegaConfBaseException) as error:
        _fail(_message(error))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; the same command goes on from here.\n")
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"Error: {message}\n")
    sys.exit(EXIT_CODE)


def _message(error: BaseException) -> str:
    """The message, with the cause that names the key where Hydra hides it."""
    parts = [str(error).strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause).strip() not in parts[0]:
        parts.append(str(cause).strip())
    return "\n".join(parts)
