"""Where metrics go: JSON lines always, TensorBoard and wandb if asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from experiments.comparison.records import append_record
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
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
            from experiments.training.wandb_run import Wandb

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
        from experiments.comparison.tables import markdown

        text = markdown((list(header), [[str(cell) for cell in row] for row in rows]))
        self._writer.add_text(name, text)

    def image(self, name: str, path: Path) -> None:
        """Add the image."""
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
