"""Where metrics go: a file of JSON lines always, and wandb if configured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import Config
from experiments.study.console import ExperimentError, MissingGroupError
from experiments.study.json_records import append_record
from experiments.study.run_folder import RunFolder, flatten

if TYPE_CHECKING:
    import wandb


class Loggers:
    """Logs to ``metrics.jsonl``, a line ``{"step": ..., name: value, ...}`` each, and to wandb.

    Args:
        metrics: That file.
        run: The run of wandb, if there is one.
    """

    def __init__(self, metrics: Path, run: wandb.Run | None) -> None:
        self._metrics, self.run = metrics, run

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics by name at a step; in the file, values that are not finite become null."""
        finite = {k: v if abs(v) < float("inf") else None for k, v in metrics.items()}
        append_record(self._metrics, {"step": step, **finite}, durable=False)
        if self.run is not None:
            self.run.log({"step": step, **metrics})


@contextmanager
def open_loggers(config: Config, folder: Path, *, job: str) -> Iterator[Loggers]:
    """Open the configured loggers and close them at the end of the block.

    Args:
        config: All settings.
        folder: The run folder; its name is the name of the run.
        job: Kind of run (``train``, ``evaluate``).

    Raises:
        ExperimentError: wandb cannot be reached.
    """
    run = wandb_run(config, folder, job) if config.logger.wandb else None
    try:
        yield Loggers(RunFolder(folder).metrics, run)
    finally:
        if run is not None:
            run.finish()


_INIT_TIMEOUT_S = 30


def wandb_run(config: Config, folder: Path, job: str) -> wandb.Run:
    """Start a wandb run: named after its folder, grouped by comparison, tagged by agent and model.

    All runs of a comparison use its folder as wandb's, so that ``wandb leet`` shows them
    together. The run is online if a login is found, otherwise offline. A resumed training
    keeps its id. For arguments and errors see `open_loggers`.
    """
    try:
        import wandb
    except ImportError:
        raise MissingGroupError("wandb", "logger=wandb", "agents") from None
    # Weave mistakes our package `agents` for another one.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    about = [config.agent.name, f"seed-{config.seed}"] if job == "train" else []
    config.root.mkdir(parents=True, exist_ok=True)
    try:
        mode: Any = os.environ.get("WANDB_MODE")
        run = wandb.init(
            dir=str(config.root),
            project=config.logger.project,
            group=config.name,
            job_type=job,
            name=folder.name if job == "train" else f"{job}-{config.name}",
            id=_run_id(folder),
            resume="allow",
            tags=[*about, Path(config.model.name).name[:64]],
            config=logged_settings(config),
            mode=mode or ("online" if wandb.login(prompt=False) else "offline"),
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, init_timeout=_INIT_TIMEOUT_S
            ),
        )
    except wandb.errors.CommError as error:
        raise ExperimentError(
            f"wandb is not reachable ({error}); set WANDB_MODE=offline, and run `wandb sync` later."
        ) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(folder: Path) -> str:
    path = folder / "wandb_id.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(6).hex())
    return path.read_text().strip()


_LOGGED = (
    "name", "seed", "model", "calibration", "importance", "workload", "reward", "env", "agent",
    "warm_start", "score_model", "frontier", "evaluate",
)  # fmt: skip


def logged_settings(config: Config) -> dict[str, Any]:
    """Return the settings of trainings and evaluations by flat names, by which wandb filters."""
    settings = flatten(asdict(config)).items()
    return {key: value for key, value in settings if key.partition(".")[0] in _LOGGED}
