"""Settings of the replay: arrivals, prompts, and how each system serves them."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.common import TextConfig, above_zero, at_least, one_of, parse_shape
from experiments.errors import ExperimentError

SYSTEMS = (
    "dense", "static_gsi", "static_gsi_lean", "static_shortgpt", "greedy", "frontier", "rap",
    "oracle",
)  # fmt: skip
"""Systems that can be replayed."""

TIMINGS = ("wall", "cpu")
METERS = ("process", "tensors")
RESIDENCIES = ("resident", "offload", "drop")
RESTORES = ("refill", "next_request")
KNOWN_TASKS = ("lambada_openai", "rap_recall")
"""Tasks whose answer continues the prompt, so that generated text can be checked against it."""


def _few_windows() -> TextConfig:
    """Return settings of a text that the dense model writes within half a minute."""
    return TextConfig(source="self", windows=4, window_tokens=64, seed=1)


@dataclass
class ReplayConfig:
    """An open-loop replay of the same arrivals on several systems.

    The defaults are one minute of synthetic traffic for each system, on the default model.
    """

    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """Systems to run, in this order; all get the same arrivals and the same budget."""
    trace: str | None = None
    """A CSV file with TIMESTAMP, ContextTokens and GeneratedTokens; null generates
    `traffic`."""
    traffic: str = "azure-conv"
    """Model of the synthetic traffic: ``azure-conv`` or ``azure-code``."""
    arrivals_per_minute: float = 300.0
    """Arrival rate of the synthetic traffic, in trace time and before `every` is applied."""
    minutes: float = 10.0
    """Minutes of the trace to replay."""
    every: int = 75
    """Keep one request out of this many."""
    time_scale: float = 10.0
    """Seconds of trace time per second of the replay."""
    token_scale: float = 0.1
    """Factor by which prompt lengths are scaled."""
    new_token_scale: float | None = None
    """Factor by which answer lengths are scaled; null for `token_scale`."""
    max_prompt_tokens: int = 256
    max_new_tokens: int = 32
    text: TextConfig = field(default_factory=_few_windows)
    """Text that prompts are cut from."""
    known_share: float = 0.25
    """Share of requests with a known answer."""
    known_task: str = "rap_recall"
    """``rap_recall`` (lists from templates), or ``lambada_openai``, which needs `data_root`."""
    data_root: str | None = None
    """Folder with one folder for each lm-eval task, for ``lambada_openai``."""
    reference: str = "8x256"
    """Batch x tokens: budget fractions refer to the dense model's peak bytes at this request."""
    policy: str = "rap"
    """Policy of the system ``rap``: an exported file, or the name of a bundled policy."""
    frontier: str = "frontier"
    """Table of the systems ``frontier`` and ``oracle``: a file, or the name of a bundled one."""
    gsi: str | None = None
    """GSI artifact of the system ``static_gsi``; null for the order in the policy file."""
    static_batch: int | None = None
    """Batch size that static masks are chosen for (``static_gsi_lean``: 1); null for
    `max_batch_size`."""
    greedy_tokens: int = 16
    """Tokens of text on which the system ``greedy`` evaluates masks while it serves."""
    max_batch_size: int = 8
    max_queue: int = 64
    """Maximum number of waiting requests; further ones are rejected."""
    queue_timeout_s: float = 30.0
    """Seconds after which a waiting request times out."""
    prefill_chunk_tokens: int = 256
    restore: str = "refill"
    """When a restored attention block is used again: after a cache ``refill``, or from the
    ``next_request`` on."""
    residency: str = "offload"
    """Where removed weights go: ``resident``, ``offload`` or ``drop``."""
    meter: str = "process"
    """Which memory is measured: that of the ``process``, or of ``tensors`` only."""
    timing: str = "wall"
    """Clock: ``wall`` time, or ``cpu`` time of the process, which other processes on the machine
    do not lengthen (CPU devices only)."""
    margin_share: float = 0.0
    hysteresis_share: float = 0.05
    """Share of the budget that must be free before blocks are restored."""
    hold_s: float = 2.0
    """Minimum time for which a mask is kept before blocks are restored, in seconds."""
    mask_loss_windows: int = 2
    """Windows of `text` on which ΔNLL of the used masks is measured; 0 for none."""
    figures: bool = True

    def __post_init__(self) -> None:
        self._check_names()
        at_least("replay", 1, every=self.every, max_prompt_tokens=self.max_prompt_tokens,
                 max_new_tokens=self.max_new_tokens, max_batch_size=self.max_batch_size,
                 static_batch=self.static_batch, max_queue=self.max_queue,
                 prefill_chunk_tokens=self.prefill_chunk_tokens)  # fmt: skip
        at_least("replay", 2, greedy_tokens=self.greedy_tokens)
        at_least("replay", 0, margin_share=self.margin_share, hold_s=self.hold_s,
                 hysteresis_share=self.hysteresis_share,
                 mask_loss_windows=self.mask_loss_windows)  # fmt: skip
        above_zero("replay", minutes=self.minutes, time_scale=self.time_scale,
                   token_scale=self.token_scale, new_token_scale=self.new_token_scale,
                   arrivals_per_minute=self.arrivals_per_minute,
                   queue_timeout_s=self.queue_timeout_s)  # fmt: skip
        if not 0 <= self.known_share <= 1:
            raise ExperimentError(
                f"replay.known_share must be from 0 to 1, not {self.known_share}."
            )
        if self.known_task == "lambada_openai" and self.known_share and not self.data_root:
            raise ExperimentError(
                "replay.known_task=lambada_openai needs replay.data_root, a folder with "
                "lambada_openai/test.jsonl; or set replay.known_task=rap_recall."
            )
        _ = self.reference_shape

    def _check_names(self) -> None:
        if not self.systems or len(set(self.systems)) < len(self.systems):
            raise ExperimentError(
                "replay.systems must have at least one entry and none twice, not "
                f"{list(self.systems)}."
            )
        for system in self.systems:
            one_of("system of replay.systems", system, SYSTEMS)
        for name, known in (("known_task", KNOWN_TASKS), ("timing", TIMINGS), ("meter", METERS),
                            ("residency", RESIDENCIES), ("restore", RESTORES)):  # fmt: skip
            one_of(f"replay.{name}", getattr(self, name), known)

    @property
    def reference_shape(self) -> tuple[int, int]:
        """The reference as (batch size, sequence length in tokens)."""
        return parse_shape(self.reference)
