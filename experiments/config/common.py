"""Settings that most programs read: model, measuring, importance, texts and tasks; parsed forms."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from experiments.study.console import ExperimentError
from rap_env.importance.profiles import GSI_METHODS
from rap_env.specs import setting

Shape = tuple[int, int]
"""Batch size and sequence length in tokens."""

Cell = tuple[int, int, float]
"""Batch size, sequence length in tokens, budget as a fraction of the native peak."""

_SHAPE = re.compile(r"(\d+)x(\d+)")
_PINNED = re.compile(r"(\d+x\d+)@(\d+)(?:~(\d*\.?\d+))?")


def _match(pattern: re.Pattern[str], text: str, what: str) -> re.Match[str]:
    """The match of a whole text; an `ExperimentError` says what it should be."""
    match = pattern.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(f"A {what}; {text!r} is not.")
    return match


def parse_shape(text: str) -> Shape:
    """Parse ``"8x2048"`` into (8, 2048).

    Raises:
        ExperimentError: The text has another form.
    """
    match = _match(_SHAPE, text, "request is BATCHxTOKENS, such as 8x2048")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Pinned:
    """A request with a budget in bytes.

    Attributes:
        shape: Batch size and sequence length in tokens.
        budget_bytes: The budget.
        target_delta_nll: ΔNLL that a reference method has there, nats per token; None if
            unknown.
    """

    shape: Shape
    budget_bytes: int
    target_delta_nll: float | None = None

    def __str__(self) -> str:
        target = "" if self.target_delta_nll is None else f"~{self.target_delta_nll:g}"
        return f"{self.shape[0]}x{self.shape[1]}@{self.budget_bytes}{target}"


def parse_pinned(text: str) -> Pinned:
    """Parse ``"8x2048@101234567"`` or ``"8x2048@101234567~0.5"``.

    The number behind ``~`` is the ΔNLL that the budget stands for.

    Raises:
        ExperimentError: The text has another form.
    """
    shown = "BATCHxTOKENS@BYTES or BATCHxTOKENS@BYTES~DELTA_NLL, such as 8x2048@101234567~0.5"
    match = _match(_PINNED, text, f"pinned cell is {shown}")
    target = None if match[3] is None else float(match[3])
    return Pinned(parse_shape(match[1]), int(match[2]), target)


@dataclass
class ModelConfig:
    """The language model that is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training only)."""
    device: str = "auto"
    """``auto`` (CUDA if there is a device), ``cpu``, or ``cuda``."""
    dtype: str = "auto"
    """``auto`` (the shortest that the processor has instructions for), ``bfloat16``,
    ``float16`` or ``float32``."""
    weights: str = "auto"
    """``bf16``: unquantised, in `dtype`; ``native``: as the model's file has them; ``auto``:
    native if ``env.id`` is ``RAPLadder-v0``, else bf16."""


@dataclass
class ImportanceConfig:
    """Importance scores that the agent observes."""

    method: str = setting("gsi", choices=("gsi", "one_shot", "none"))
    """``gsi``: greedy sequential importance; ``one_shot``: one measurement for each item."""
    gsi_removals: int | None = setting(16, low=1)
    """Number of blocks that GSI removes; null for all."""
    gsi_method: str = setting("exact", choices=GSI_METHODS)
    """``lazy`` is several times faster than ``exact``."""


@dataclass
class TextConfig:
    """Text cut into windows."""

    source: str = MISSING
    """``self`` (written by the native model), a text or JSONL file, or a hub data set."""
    windows: int = setting(4, low=1)
    """Number of windows."""
    window_tokens: int = setting(128, low=2)
    """Tokens of each window."""
    seed: int = 0
    """Seed of the choice of windows, or of the model that writes them."""
    field: str = "text"
    """Field of a JSONL file or data set that holds the text."""


@dataclass
class TasksConfig:
    """lm-eval tasks."""

    names: list[str] = setting([])
    """None without names."""
    limit: int | None = setting(None, low=1)
    """Documents of each task; null for all."""
    data_root: str | None = None
    """Folder with local files of hub tasks; null for the hub's."""
    num_fewshot: int = setting(0, low=0)
    """Solved examples before each question."""
