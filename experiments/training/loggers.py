"""Where metrics go: JSON lines always, TensorBoard and wandb if asked for."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from experiments.comparison.records import append_record
from experiments.comparison.run_folder import RunFolder, flatten
from experiments.config import Config
from experiments.errors import ExperimentError
from rap_env.errors import MissingDependencyError


class MetricLogger(Protocol):
    """One place that takes metrics, tables and images."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take metrics by name at a step."""

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table."""

    def image(self, name: str, path: Path) -> None:
        """Take a PNG file."""

    def close(self) -> None:
        """Write what is left."""


class Loggers:
    """Several loggers as one.

    Args:
        parts: The loggers.
    """

    def __init__(self, parts: Sequence[MetricLogger]) -> None:
        self.parts = parts

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take metrics by name at a step; this is the sink that a training calls."""
        for part in self.parts:
            part.log(metrics, step)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table."""
        for part in self.parts:
            part.table(name, header, rows)

    def image(self, name: str, path: Path) -> None:
        """Take a PNG file."""
        for part in self.parts:
            part.image(name, path)


@contextmanager
def open_loggers(config: Config, folder: Path, *, job: str, step: int = 0) -> Iterator[Loggers]:
    """The loggers that the settings ask for, closed at the end whatever happens.

    Args:
        config: All settings.
        folder: The run's folder; its name becomes the run's name.
        job: Kind of run (``train``, ``evaluate``).
        step: Step from which a resumed run goes on; later ones were lost and come again.

    Raises:
        MissingDependencyError: wandb or tensorboard was asked for but is not installed.
    """
    with ExitStack() as stack:
        parts: list[MetricLogger] = [JsonLines(RunFolder(folder).metrics)]
        if config.logger.tensorboard:
            parts.append(TensorBoard(folder / "tensorboard", step))
        if config.logger.wandb:
            from experiments.training.loggers import Wandb

            parts.append(Wandb(config, folder, job))
        for part in parts:
            stack.callback(part.close)
        yield Loggers(parts)


class JsonLines:
    """``metrics.jsonl``: one line ``{"step": ..., name: value, ...}`` a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append a line; values that are not finite become null."""
        finite = {k: v if abs(v) < float("inf") else None for k, v in metrics.items()}
        append_record(self.path, {"step": step, **finite}, durable=False)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing: tables have files of their own."""

    def image(self, name: str, path: Path) -> None:
        """Nothing: the image is a file already."""

    def close(self) -> None:
        """Nothing is left."""


class TensorBoard:
    """Event files for ``tensorboard --logdir``.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError("tensorboard", "logger=tensorboard", "agents") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add the table as text, which TensorBoard shows as Markdown."""
        from experiments.comparison.formatting import markdown

        text = markdown((list(header), [[str(cell) for cell in row] for row in rows]))
        self._writer.add_text(name, text)

    def image(self, name: str, path: Path) -> None:
        """Add the image."""
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


log = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 30


class Wandb:
    """A wandb run: named after its folder, grouped by comparison, tagged by agent and model.

    All runs of a comparison share its folder as wandb's, so that ``wandb leet`` shows them
    together; a resumed run keeps its id.

    Raises:
        MissingDependencyError: wandb is not installed.
    """

    def __init__(self, config: Config, folder: Path, job: str) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", "logger=wandb", "agents") from None
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes our `agents` for another
        self._wandb = wandb
        options: dict[str, Any] = {
            "dir": str(config.root),
            "project": config.logger.project,
            "group": config.name,
            "job_type": job,
            "name": folder.name if job == "train" else f"{job}-{config.name}",
            "id": self._run_id(folder),
            "resume": "allow",
            "tags": self._tags(config, job),
            "config": self._settings(config),
        }
        self._run = self._open(wandb_mode(config.logger.wandb_mode), options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics over the environment's steps."""
        self._run.log({"step": step, **metrics})

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        self._run.log({name: self._wandb.Table(columns=list(header), data=[list(r) for r in rows])})

    def image(self, name: str, path: Path) -> None:
        """Log an image."""
        self._run.log({name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()

    def _open(self, mode: str, options: dict[str, Any]) -> Any:
        Path(options["dir"]).mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            silent=True, console="off", x_disable_stats=True, init_timeout=_INIT_TIMEOUT_S
        )
        options["mode"] = mode
        try:
            return self._wandb.init(settings=settings, reinit="create_new", **options)
        except self._wandb.errors.Error as error:
            if mode == "offline":
                raise
            log.warning("wandb cannot be reached (%s); logging offline.", error)
            options = {**options, "id": f"{options['id']}-offline", "mode": "offline"}
            return self._wandb.init(settings=settings, reinit="create_new", **options)

    @staticmethod
    def _run_id(folder: Path) -> str:
        path = folder / "wandb_id.txt"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(os.urandom(6).hex())
        return path.read_text().strip()

    @staticmethod
    def _settings(config: Config) -> dict[str, Any]:
        """Return all settings under flat names, by which wandb sorts, filters and draws runs."""
        settings = flatten(asdict(config))
        settings.pop("runs_dir")
        return settings

    @staticmethod
    def _tags(config: Config, job: str) -> list[str]:
        about = [config.agent.name, f"seed-{config.seed}"] if job == "train" else []
        return [*about, Path(config.model.name).name[:64], *config.logger.tags]


def wandb_mode(setting: str) -> str:
    """The mode for `wandb.init`; ``auto`` is online only where a login is already there.

    ``WANDB_MODE`` is respected under ``auto``. Nothing is ever asked for.

    Raises:
        ExperimentError: ``online`` was asked for without a login.
    """
    mode = os.environ.get("WANDB_MODE", "") if setting == "auto" else setting
    if not mode:
        return "online" if has_login() else "offline"
    if mode == "online" and not has_login():
        raise ExperimentError(
            "wandb was asked to be online, but there is no login; run `wandb login` first, or "
            "set logger.wandb_mode=offline and `wandb sync` later."
        )
    return mode


def has_login() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
