"""Settings of the replay of arrivals on several systems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from experiments.config.common import (
    Count,
    NotNegative,
    Positive,
    Section,
    ShapeText,
    Share,
    TextConfig,
    among,
    distinct,
    parse_shape,
    within,
)
from rap_env.serving.settings import ServerSettings
from rap_env.specs import settings_of

Meter = Annotated[str, among("process", "tensors")]

MASK_SYSTEMS = (
    "dense", "static_gsi", "static_gsi_lean", "static_shortgpt", "greedy", "frontier", "rap",
    "oracle",
)  # fmt: skip
"""Systems that remove blocks only; the default."""
UNIFORM_SYSTEMS = tuple(
    f"uniform_{weights}_{cache}"
    for weights in ("native", "int8", "int4")
    for cache in ("native", "int8", "int4", "int2")
)
"""Systems with one level for all weights and one for all caches."""
SYSTEMS = (*MASK_SYSTEMS, "knapsack", *UNIFORM_SYSTEMS)
"""Systems that can be replayed."""


@dataclass
class ReplayConfig(Section):
    """An open-loop replay of the same arrivals on several systems.

    The defaults are one minute of synthetic traffic for each system, on the default model.
    """

    section = "replay"
    systems: Annotated[list[Annotated[str, among(*SYSTEMS)]], distinct] = field(
        default_factory=lambda: list(MASK_SYSTEMS)
    )
    """Systems to run, in this order; all get the same arrivals and the same budget."""
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
    """Share of requests with a known answer."""
    data_root: str | None = None
    """Folder with ``lambada_openai/test.jsonl``, whose last words are the known answers; null for
    lists from templates."""
    reference: ShapeText = "8x256"
    """Batch x tokens: budget fractions refer to the dense model's peak bytes at this request."""
    policy: str = "rap-v0"
    """Policy of the system ``rap``: an exported file, or the name of a bundled policy: ``rap-v0``
    removes blocks, ``rap`` lowers items of the default model with native weights."""
    knapsack: str = "knapsack"
    """Policy of the system ``knapsack``: level costs, or the name of bundled ones."""
    frontier: str = "frontier"
    """Table of the systems ``frontier`` and ``oracle``: a file, or the name of a bundled one."""
    greedy_tokens: Annotated[int, within(2)] = 16
    """Tokens of text on which the system ``greedy`` evaluates masks while it serves."""
    max_batch_size: Count = 8
    max_queue: Count = 64
    """Maximum number of waiting requests; further ones are rejected."""
    queue_timeout_s: Positive = 30.0
    """Seconds after which a waiting request times out."""
    prefill_chunk_tokens: Count = 256
    residency: Annotated[str, among(*settings_of(ServerSettings)["residency"].choices)] = "offload"
    """Where removed weights go: ``resident``, ``offload`` or ``drop``."""
    meter: Meter = "process"
    """Which memory is measured: that of the ``process``, or of ``tensors`` only."""
    timing: Annotated[str, among("wall", "cpu")] = "wall"
    """Clock: ``wall`` time, or ``cpu`` time of the process, which other processes on the machine
    do not lengthen (CPU devices only)."""
    hold_s: NotNegative = 2.0
    """Minimum time for which a mask is kept before blocks are restored, in seconds."""
    mask_loss_windows: Count = 2
    """Windows of `text` on which ΔNLL of the used plans is measured."""

    @property
    def reference_shape(self) -> tuple[int, int]:
        """The reference as (batch size, sequence length in tokens)."""
        return parse_shape(self.reference)
