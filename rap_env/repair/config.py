"""Settings of repair, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rap_env.errors import InvalidRequestError, check_name

REPAIRS = ("none", "library")
"""Words that the setting ``repair`` accepts; any other value is the path of a stub library."""

NO_LIBRARY = (
    "Any other value is the path of a stub library, written by "
    "rap_env.repair.fitting.fit_library(...).save(path); there is no such file."
)
"""The end of the message about a name that is neither one of them nor a file."""

_LAST_RATE = 0.05  # share of the learning rate that is left at the end


def check_repair(name: str) -> None:
    """Raise an `UnknownNameError` unless it is one of `REPAIRS` or a file."""
    if not Path(name).expanduser().is_file():
        check_name("repair", name, REPAIRS, NO_LIBRARY)


def repair_label(name: str) -> str:
    """Name of a setting ``repair`` in records: a file by its name and folder, as texts are.

    >>> repair_label("some/where/runs/stubs.safetensors")
    'runs/stubs.safetensors'
    """
    return "/".join(Path(name).parts[-2:])


@dataclass(frozen=True)
class FitConfig:
    """Settings of fitting stubs.

    Attributes:
        rank: Mean rank of the stubs: together they take as many bytes as stubs of this rank.
        ridges: Penalties to choose from for each block, as multiples of the mean variance.
        ranks: Ranks to choose from for each block; a single one is that of every block.

    Raises:
        InvalidRequestError: A number is out of range.
    """

    rank: int = 64
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    ranks: tuple[int, ...] = (0, 8, 16, 32, 64, 96, 128, 192, 256)

    def __post_init__(self) -> None:
        if self.rank < 0 or min(self.ranks, default=0) < 0:
            raise InvalidRequestError(f"Ranks of stubs must be 0 or above, not {self}.")
        if min(self.ranks, default=self.rank + 1) > self.rank:
            raise InvalidRequestError(
                f"No rank of {self.ranks} is within the mean rank of {self.rank}."
            )
        if not self.ridges or min(self.ridges) <= 0:
            raise InvalidRequestError(f"Ridge penalties must be above 0, not {self.ridges}.")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of distilling stubs.

    Attributes:
        steps: Number of updates, each under one mask.
        windows: Windows of the text in each update.
        learning_rate: Learning rate of Adam after the warm-up; it decays along half a cosine.
        warmup_steps: Updates over which the rate rises.
        seed: Seeds the masks and the order of the text.

    Raises:
        InvalidRequestError: A number is out of range.
    """

    steps: int = 1200
    windows: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("windows", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if value < least:
                raise InvalidRequestError(
                    f"{name} of a distillation must be at least {least}, not {value}."
                )
        if not 0 < self.learning_rate < float("inf"):
            raise InvalidRequestError(
                f"The learning rate must be above 0, not {self.learning_rate}."
            )

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = (1 + np.cos(np.pi * step / self.steps)) / 2
        return float(self.learning_rate * rise * (_LAST_RATE + (1 - _LAST_RATE) * fall))
