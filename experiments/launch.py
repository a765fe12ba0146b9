"""Entry points of all programs: Hydra composition, errors and threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.comparison.run_folder import run_label
from experiments.config import Config, as_config
from experiments.config.evaluation import CompareConfig, ExportPolicyConfig
from experiments.console import fail, message
from experiments.errors import ExperimentError
from rap_env.artifacts import atomic_write
from rap_env.errors import RapError

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
GROUPS = {
    "hydra/sweeper/optuna": "sweeps",
    "hydra/launcher/submitit": "slurm",
    "hydra/launcher/ray'": "ray",
}
"""Dependency group that provides a plugin, by the name that Hydra reports as missing."""

_THREADS_FILE = "threads.txt"

Stage = Callable[[Config, Path], Any]
S = TypeVar("S")


def register() -> None:
    """Register the schemas and the resolver that names run folders with Hydra."""
    store = ConfigStore.instance()
    store.store(name="rap_schema", node=Config)
    store.store(name="compare_schema", node=CompareConfig)
    store.store(name="export_policy_schema", node=ExportPolicyConfig)
    if not OmegaConf.has_resolver("rap_label"):
        OmegaConf.register_new_resolver("rap_label", _run_label)


def _run_label(stage: str, label: str | None, agent: str, seed: int | str, overrides: str) -> str:
    return run_label(stage, label or agent, seed, overrides)


register()  # at import, so that the worker processes of a parallel sweep have them as well


def launch(stage: str, run: Stage) -> None:
    """Compose the settings with Hydra and run one stage, or a sweep of it.

    Args:
        stage: Name of the program and of its file in ``conf/``.
        run: Called with the settings and the run folder. A number that it returns is the
            objective that an optimising sweeper minimises.
    """

    @hydra.main(version_base=None, config_path=str(CONF_DIR), config_name=stage)
    def main(node: DictConfig) -> float | None:
        try:
            config = as_config(node)
            if config.threads is None and runs_in_parallel(HydraConfig.get()):
                config = replace(config, threads=1)
            if stage != "report":  # a report runs no model
                set_threads(config)
            result = run(config, Path(HydraConfig.get().runtime.output_dir))
            return result if isinstance(result, float) else None
        except RapError as error:
            if HydraConfig.get().mode == RunMode.RUN:
                fail(str(error))
            # In a sweep, Hydra finishes the other jobs first and then returns the error. An
            # error that holds only its message can be pickled by a worker process.
            raise ExperimentError(str(error)) from None

    _run_main(main)


def launch_reader(name: str, schema: type[S], run: Callable[[S], Any]) -> None:
    """Run a program that has its own settings and makes no run folder.

    Args:
        name: Name of the program and of its file in ``conf/``.
        schema: The class of its settings, from which that file starts.
        run: Called with the settings.
    """

    @hydra.main(version_base=None, config_path=str(CONF_DIR), config_name=name)
    def main(node: DictConfig) -> None:
        try:
            config = OmegaConf.to_object(node)
            assert isinstance(config, schema)
            run(config)
        except RapError as error:  # caught here, because Hydra adds text to errors of a job
            fail(str(error))

    _run_main(main)


def _run_main(main: Callable[[], Any]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing a traceback
    try:
        main()
    except (RapError, HydraException, OmegaConfBaseException) as error:
        fail(_with_group(message(error)))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Run the same command again to continue.\n")
        sys.exit(130)


def runs_in_parallel(hydra: Any) -> bool:
    """Whether jobs of a sweep run in parallel, as with every launcher except Hydra's own.

    Each job then uses one thread of torch: jobs that measured the fastest number of threads at
    the same time would disturb each other.
    """
    return bool(
        hydra.mode == RunMode.MULTIRUN and not hydra.launcher._target_.endswith(".BasicLauncher")
    )


def _with_group(message: str) -> str:
    """The message, with the command that installs a missing plugin of Hydra."""
    for plugin, group in GROUPS.items():
        if plugin in message:
            return (
                f"{message}\nInstall the dependency group that has it: pip install --group {group}"
            )
    return message


def set_threads(config: Config) -> None:
    """Set torch's number of threads before anything is measured.

    Rounding depends on the number of threads, so all stages of a comparison, including one that
    resumes, use the number that its first stage chose.
    """
    from rap_env.llm.device import bound_kernel_caches, use_threads

    bound_kernel_caches()  # before the first matrix product, which measures the threads
    use_threads(config.threads or _stored_threads(config.root / _THREADS_FILE))


def _stored_threads(path: Path) -> int:
    """The number of threads stored for this comparison; measures and stores it if missing."""
    from rap_env.llm.device import fastest_threads

    try:
        return max(1, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        threads = fastest_threads()
    with atomic_write(path) as file:
        file.write(f"{threads}\n".encode())
    return threads
