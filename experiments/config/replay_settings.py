"""Settings of the replay of arrivals on several systems."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.common import TextConfig, parse_shape
from rap_env.specs import setting


@dataclass
class BudgetConfig:
    """Memory that other tenants of a machine leave free."""

    unit: str = setting("fraction", choices=("fraction", "bytes"))
    """What capacity, floor and sizes are: fractions of the native model's peak bytes at
    `replay.reference`, or bytes."""
    capacity: float = setting(1.05, above=0)
    """What is free without tenants."""
    floor: float = setting(0.74, above=0)
    """What is always left; tenants that would leave less are rejected."""
    sizes: list[float] = setting([0.05, 0.1, 0.15], distinct=True, above=0)
    """What a tenant takes is one of them."""
    arrivals_per_minute: float = setting(6.0, above=0)
    mean_stay_s: float = setting(15.0, above=0)
    seed: int = 0


@dataclass
class ReplayConfig:
    """An open-loop replay of the same arrivals on several systems.

    The defaults are one minute of synthetic traffic for each system, on the default model.
    """

    systems: list[str] = setting(
        ["dense", "static_gsi", "static_gsi_lean", "frontier", "rap-v0"], distinct=True
    )
    """Systems to run, in this order, with the same arrivals and budget: policies by their name or
    file; ``static_gsi``, one mask that always fits a full batch, or ``static_gsi_lean``, a batch of
    one; or ``uniform_native_LEVEL``, with all caches at one level."""
    order: str = "rap-v0"
    """Policy whose order of blocks the systems ``static_gsi`` and ``uniform_native`` follow."""
    trace: str | None = None
    """A CSV file with TIMESTAMP, ContextTokens and GeneratedTokens; null samples arrivals with the
    lengths of Azure's conversations."""
    arrivals_per_minute: float = setting(300.0, above=0)
    """Arrival rate without a trace, in trace time and before `every` is applied."""
    minutes: float = setting(10.0, above=0)
    """Minutes of the trace to replay."""
    every: int = setting(75, low=1)
    """Keep one request out of this many."""
    time_scale: float = setting(10.0, above=0)
    """Seconds of trace time per second of the replay."""
    token_scale: float = setting(0.1, above=0)
    """Factor by which lengths are scaled."""
    max_prompt_tokens: int = setting(256, low=1)
    max_new_tokens: int = setting(32, low=1)
    text: TextConfig = field(
        default_factory=lambda: TextConfig(source="self", windows=4, window_tokens=64, seed=1)
    )
    """Text that prompts are cut from; the dense model writes this one within half a minute."""
    known_share: float = setting(0.25, low=0, high=1)
    """Share of requests with a known answer, if there is `data_root`."""
    data_root: str | None = None
    """Folder with ``lambada_openai/test.jsonl``, whose last words are the known answers."""
    reference: str = setting("8x256", parse=parse_shape)
    """Batch x tokens: budget fractions refer to the dense model's peak bytes at this request."""
    max_batch_size: int = setting(8, low=1)
    queue_timeout_s: float = setting(30.0, above=0)
    """Seconds after which a waiting request times out."""
    prefill_chunk_tokens: int = setting(256, low=1)
    timing: str = setting("wall", choices=("wall", "cpu"))
    """Clock: ``wall`` time, or ``cpu`` time of the process, which other processes on the machine
    do not lengthen (CPU devices only)."""
    mask_loss_windows: int = setting(2, low=1)
    """Windows of `text` on which ΔNLL of the used plans is measured."""

    @property
    def reference_shape(self) -> tuple[int, int]:
        """The reference as (batch size, sequence length in tokens)."""
        return parse_shape(self.reference)


@dataclass
class CgroupConfig:
    """Settings of ``experiments.studies.replay.cgroup``: a server and a tenant in one cgroup."""

    systems: list[str] = setting(["rap"])
    """Servers, one after the other: rap, llama.cpp and transformers."""
    llama_server: str = "llama-server"
    """llama.cpp's program."""
    limit_mib: int = setting(760, low=1)
    """Limit of both together."""
    tenant_mib: list[int] = setting([50, 280])
    """Least and most of the tenant."""
    minutes: float = setting(5, low=0)
    clients: int = setting(3, low=1)
