"""What ``experiments.replay`` serves, to whom, and with what."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.common import TextConfig, at_least, parse_shape
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

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
"""Tasks whose answers follow the prompt, so that generating shows whether they are known."""


def _few_windows() -> TextConfig:
    """Text by the dense model itself, no more than it writes in half a minute."""
    return TextConfig(source="self", windows=4, window_tokens=64, seed=1)


@dataclass
class ReplayConfig:
    """An open-loop replay: when requests come, what they ask, and how each system is served.

    The defaults are a minute of drawn traffic for each system, on the default model.
    """

    systems: list[str] = field(default_factory=lambda: list(SYSTEMS))
    """Which systems are run, in this order; each sees the same arrivals and the same budget."""
    trace: str | None = None
    """A CSV file with TIMESTAMP, ContextTokens and GeneratedTokens; null draws `traffic`."""
    traffic: str = "azure-conv"
    """Fitted traffic where there is no file: ``azure-conv`` or ``azure-code``."""
    arrivals_per_minute: float = 300.0
    """Rate of the fitted traffic in the trace's own time, before thinning."""
    minutes: float = 10.0
    """Minutes of the trace that are taken."""
    every: int = 75
    """Each so-many-th request is kept."""
    time_scale: float = 10.0
    """Seconds of the trace in one second of the replay."""
    token_scale: float = 0.1
    """Factor on the tokens of prompts."""
    new_token_scale: float | None = None
    """Factor on the tokens of answers; null for that of prompts."""
    max_prompt_tokens: int = 256
    max_new_tokens: int = 32
    text: TextConfig = field(default_factory=_few_windows)
    """Where prompts are cut from."""
    known_share: float = 0.25
    """Share of the requests that have a known answer."""
    known_task: str = "rap_recall"
    """``rap_recall`` (lists, made from templates), or ``lambada_openai`` with `data_root`."""
    data_root: str | None = None
    """Folder with a folder for each lm-eval task, for ``lambada_openai``."""
    reference: str = "8x256"
    """Batch x tokens: fractions of the budget are of the dense model's bytes there."""
    policy: str = "rap"
    """The exported policy of the system ``rap``: its file, or the package's by name."""
    frontier: str = "frontier"
    """The table of the systems ``frontier`` and ``oracle``: its file, or the package's by name."""
    gsi: str | None = None
    """GSI artifact of the system ``static_gsi``; null takes the order in the policy file."""
    static_batch: int | None = None
    """Rows that static masks are chosen for (``static_gsi_lean``: one); null: `max_batch_size`."""
    greedy_tokens: int = 16
    """Tokens of the text on which the system ``greedy`` measures while it serves."""
    max_batch_size: int = 8
    max_queue: int = 64
    """Requests that wait at most; more are refused."""
    queue_timeout_s: float = 30.0
    """Seconds after which a request that waits is given up."""
    prefill_chunk_tokens: int = 256
    restore: str = "refill"
    """What becomes of a restored attention block: ``refill`` or ``next_request``."""
    residency: str = "offload"
    """What becomes of removed weights: ``resident``, ``offload`` or ``drop``."""
    meter: str = "process"
    """What is measured: bytes of the ``process``, or of ``tensors`` alone."""
    timing: str = "wall"
    """Time that work takes: by the ``wall`` clock, or ``cpu`` seconds of the process, which
    neighbours on the machine do not lengthen (CPU alone)."""
    margin_share: float = 0.0
    hysteresis_share: float = 0.05
    """Share of the budget that must be free before blocks are put back."""
    hold_s: float = 2.0
    """Seconds that a mask is kept at least before blocks are put back."""
    mask_loss_windows: int = 2
    """Windows of `text` on which the masks that were used are measured; 0 for none."""
    figures: bool = True

    def __post_init__(self) -> None:
        """Refuse unknown names and numbers that cannot be."""
        self._check_names()
        at_least("replay", 1, every=self.every, max_prompt_tokens=self.max_prompt_tokens,
                 max_new_tokens=self.max_new_tokens, max_batch_size=self.max_batch_size,
                 static_batch=self.static_batch, max_queue=self.max_queue,
                 prefill_chunk_tokens=self.prefill_chunk_tokens)  # fmt: skip
        at_least("replay", 2, greedy_tokens=self.greedy_tokens)
        at_least("replay", 0, margin_share=self.margin_share, hold_s=self.hold_s,
                 hysteresis_share=self.hysteresis_share,
                 mask_loss_windows=self.mask_loss_windows)  # fmt: skip
        for name in ("minutes", "time_scale", "token_scale", "arrivals_per_minute",
                     "queue_timeout_s"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ExperimentError(f"replay.{name} must be above 0, not {getattr(self, name)}.")
        if self.new_token_scale is not None and not self.new_token_scale > 0:
            raise ExperimentError(
                f"replay.new_token_scale must be above 0, not {self.new_token_scale}."
            )
        if not 0 <= self.known_share <= 1:
            raise ExperimentError(
                f"replay.known_share is a share from 0 to 1; {self.known_share} is not."
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
                f"replay.systems needs entries, each of them once, not {list(self.systems)}."
            )
        for system in self.systems:
            if system not in SYSTEMS:
                raise UnknownNameError("system of replay.systems", system, SYSTEMS)
        for name, known in (("known_task", KNOWN_TASKS), ("timing", TIMINGS), ("meter", METERS),
                            ("residency", RESIDENCIES), ("restore", RESTORES)):  # fmt: skip
            if getattr(self, name) not in known:
                raise UnknownNameError(f"replay.{name}", getattr(self, name), known)

    @property
    def reference_shape(self) -> tuple[int, int]:
        """Batch size and sequence length in tokens of the reference."""
        return parse_shape(self.reference)
