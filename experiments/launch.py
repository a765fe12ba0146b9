"""Entry points of all programs: Hydra composition, help, errors and threads."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from experiments.config import Config, as_config
from experiments.study.console import ExperimentError, fail, message
from experiments.study.json_records import write_text
from experiments.study.run_folder import run_label
from rap_env.errors import RapError

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
CHOICES_FILE = CONF_DIR / "choices.yaml"
"""Options of the groups that have no folder of their own in ``conf/``."""

_EXCLUDE = "hydra.job.config.override_dirname.exclude_keys"

_THREADS_FILE = "threads.txt"

Stage = Callable[[Config, Path], Any]


def register() -> None:
    """Register schemas, small groups and the resolver that names run folders with Hydra."""
    store = ConfigStore.instance()
    for group, options in yaml.safe_load(CHOICES_FILE.read_text(encoding="utf-8")).items():
        for name, node in options.items():
            package = "_global_" if "_global_" in node else group
            store.store(group=group, name=name, node=node.get("_global_", node), package=package)
    store.store(name="rap_schema", node=Config)
    if not OmegaConf.has_resolver("rap_label"):

        def label(stage: str, own: str | None, agent: str, *words: Any) -> str:
            seed, overrides, mode = words
            varies = overrides if mode == RunMode.MULTIRUN else ""
            return run_label(stage, own or agent, seed, varies)

        OmegaConf.register_new_resolver("rap_label", label)


def register_program(stage: str) -> None:
    """Register a program with Hydra, unless it has a file in ``conf/``."""
    if not (CONF_DIR / f"{stage}.yaml").exists():
        node = {"defaults": ["config", "_self_"], "stage": stage, "hydra": {"job": {"name": stage}}}
        ConfigStore.instance().store(name=stage, node=node)


register()  # at import, so that the worker processes of a parallel sweep have them as well


class NameBySweep(Callback):
    """Leaves settings that do not vary in a sweep out of Hydra's ``override_dirname``.

    The jobs of a sweep do not know what varies; this callback sees the whole command.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Add the fixed settings to those that ``override_dirname`` excludes."""
        searched = config.hydra.sweeper.get("params") or {}
        lines = [f"{key}={value}" for key, value in searched.items()]
        parsed = OverridesParser.create().parse_overrides([*lines, *config.hydra.overrides.task])
        varies = {override.key_or_group: override.is_sweep_override() for override in parsed}
        fixed = [*config.hydra.job.config.override_dirname.exclude_keys]
        fixed += [key for key, swept in varies.items() if not swept]
        quoted = ",".join(f"'{key}'" for key in fixed)
        # Hydra composes the settings of each job from these overrides.
        with read_write(config):
            config.hydra.overrides.hydra.append(f"{_EXCLUDE}=[{quoted}]")


def swept_settings() -> dict[str, Any]:
    """Return what varies in the sweep of this job, with the job's values; empty outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return {}
    hydra = HydraConfig.get()
    fixed = set(hydra.job.config.override_dirname.exclude_keys)
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    values = {override.key_or_group: override.value() for override in parsed}
    return {key: value for key, value in values.items() if key not in fixed}


def launch(stage: str, run: Stage) -> None:
    """Compose the settings with Hydra and run one stage, or a sweep of it.

    Args:
        stage: Name of the program, and of its file in ``conf/`` if it has one.
        run: Called with the settings and the run folder. A number that it returns is the
            objective that an optimising sweeper minimises.
    """
    register_program(stage)

    @hydra.main(version_base=None, config_path=str(CONF_DIR), config_name=stage)
    def main(node: DictConfig) -> float | None:
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports its font cache
        try:
            config = as_config(node)
            if config.threads is None and runs_in_parallel(HydraConfig.get()):
                config = replace(config, threads=1)
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


def _run_main(main: Callable[[], Any]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing a traceback
    try:
        main()
    except RapError as error:
        fail(message(error))
    except (HydraException, OmegaConfBaseException) as error:
        reason = re.split(r"\n *(?:full_key|Config search path)", message(error))[0].strip()
        fail(f"{reason}\n--help lists the settings of a program.")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Run the same command again to continue.\n")
        sys.exit(130)


def runs_in_parallel(hydra: Any) -> bool:
    """Whether jobs of a sweep run in parallel, as with every launcher except Hydra's own.

    Each job then uses one thread of torch: jobs with threads on all cores would disturb each
    other.
    """
    return bool(
        hydra.mode == RunMode.MULTIRUN and not hydra.launcher._target_.endswith(".BasicLauncher")
    )


def set_threads(config: Config) -> None:
    """Set torch's number of threads.

    Rounding depends on the number of threads, so all stages of a comparison, including one
    that resumes, use the number that its first stage chose.
    """
    from rap_env.models.device import bound_kernel_caches, use_threads

    bound_kernel_caches()  # before the first matrix product
    use_threads(config.threads or _stored_threads(config.root / _THREADS_FILE))


def _stored_threads(path: Path) -> int:
    """The number of threads stored for this comparison; stores torch's own if missing."""
    import torch

    try:
        return max(1, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        threads = torch.get_num_threads()
    write_text(path, f"{threads}\n")
    return threads
