"""Settings of the replay of arrivals on several systems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from experiments.config.common import (
    Count,
    Positive,
    Section,
    ShapeText,
    Share,
    TextConfig,
    among,
    distinct,
    parse_shape,
    some,
)


@dataclass
class BudgetConfig(Section):
    """Memory that other tenants of a machine leave free."""

    section = "budget"
    unit: Annotated[str, among("fraction", "bytes")] = "fraction"
    """What capacity, floor and sizes are: fractions of the native model's peak bytes at
    `replay.reference`, or bytes."""
    capacity: Positive = 1.05
    """What is free without tenants."""
    floor: Positive = 0.74
    """What is always left; tenants that would leave less are rejected."""
    sizes: Annotated[list[Positive], some] = field(default_factory=lambda: [0.05, 0.1, 0.15])
    """What a tenant takes is one of them."""
    arrivals_per_minute: Positive = 6.0
    mean_stay_s: Positive = 15.0
    seed: int = 0


@dataclass
class ReplayConfig(Section):
    """An open-loop replay of the same arrivals on several systems.

    The defaults are one minute of synthetic traffic for each system, on the default model.
    """

    section = "replay"
    systems: Annotated[list[str], distinct] = field(
        default_factory=lambda: ["dense", "static_gsi", "static_gsi_lean", "frontier", "rap-v0"]
    )
    """Systems to run, in this order, with the same arrivals and budget: policies by their name or
    file; ``static_gsi``, one mask that always fits a full batch, or ``static_gsi_lean``, a batch of
    one; or ``uniform_native_LEVEL``, with all caches at one level."""
    order: str = "rap-v0"
    """Policy whose order of blocks the systems ``static_gsi`` and ``uniform_native`` follow."""
    trace: str | None = None
    """A CSV file with TIMESTAMP, ContextTokens and GeneratedTokens; null samples arrivals with the
    lengths of Azure's conversations."""
    arrivals_per_minute: Positive = 300.0
    """Arrival rate without a trace, in trace time and before `every` is applied."""
    minutes: Positive = 10.0
    """Minutes of the trace to replay."""
    every: Count = 75
    """Keep one request out of this many."""
    time_scale: Positive = 10.0
    """Seconds of trace time per second of the replay."""
    token_scale: Positive = 0.1
    """Factor by which lengths are scaled."""
    max_prompt_tokens: Count = 256
    max_new_tokens: Count = 32
    text: TextConfig = field(
        default_factory=lambda: TextConfig(source="self", windows=4, window_tokens=64, seed=1)
    )
    """Text that prompts are cut from; the dense model writes this one within half a minute."""
    known_share: Share = 0.25
    """Share of requests with a known answer, if there is `data_root`."""
    data_root: str | None = None
    """Folder with ``lambada_openai/test.jsonl``, whose last words are the known answers."""
    reference: ShapeText = "8x256"
    """Batch x tokens: budget fractions refer to the dense model's peak bytes at this request."""
    max_batch_size: Count = 8
    queue_timeout_s: Positive = 30.0
    """Seconds after which a waiting request times out."""
    prefill_chunk_tokens: Count = 256
    timing: Annotated[str, among("wall", "cpu")] = "wall"
    """Clock: ``wall`` time, or ``cpu`` time of the process, which other processes on the machine
    do not lengthen (CPU devices only)."""
    mask_loss_windows: Count = 2
    """Windows of `text` on which ΔNLL of the used plans is measured."""

    @property
    def reference_shape(self) -> tuple[int, int]:
        """The reference as (batch size, sequence length in tokens)."""
        return parse_shape(self.reference)
