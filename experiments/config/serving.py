"""How a model is served, and how a server is tried for a long time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.config.parts import at_least
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

RESIDENCIES = ("resident", "offload", "drop")
RESTORES = ("refill", "next_request")
MEMORY_SOURCES = ("auto", "cgroup", "cuda")
METERS = ("process", "tensors")

_UNITS = {
    "": 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """A number of bytes from ``"2.5GiB"``, ``"800 MB"`` or ``"1048576"``.

    Raises:
        ExperimentError: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ExperimentError(
            f"{text!r} is no number of bytes; write it as 2.5GiB, 800MB or 1048576."
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError(name, value, known)


@dataclass
class ServeConfig:
    """A server: what it serves, within which memory, and what it allows its clients."""

    policy: str = "rap"
    """Who chooses masks: ``rap``, ``frontier``, ``dense``, or an exported policy's file."""
    memory: str = "auto"
    """Budget: ``auto`` (the device's free memory, or that of the cgroup), ``cgroup``, ``cuda``,
    or a number of bytes such as ``2.5GiB``."""
    reserve: str = "128MiB"
    """Left free where the budget is what the system has free."""
    residency: str = "offload"
    """What becomes of removed weights: ``resident``, ``offload`` or ``drop``."""
    restore: str = "refill"
    """What becomes of a restored attention block's past: ``refill`` or ``next_request``."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    model_name: str | None = None
    """What clients write as ``model``; null for `model.name`."""
    decisions: str | None = "default"
    """Log of the controller's decisions: a file, ``default`` (in the run folder), or null."""
    max_batch_size: int = 8
    max_queue: int = 64
    queue_timeout_s: float | None = 120.0
    """Seconds after which a waiting request is given up; null for never."""
    max_seq_len_tokens: int | None = None
    """Most tokens of a prompt and its answer; null for what the model allows."""
    prefill_chunk_tokens: int = 256
    """Tokens of a prompt in one step: the fewer, the less do running answers wait."""
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 2048
    default_chat_tokens: int = 256
    """Tokens of a chat answer that does not ask for a number."""
    max_body_bytes: int = 262144
    max_connections: int = 128
    body_timeout_s: float = 20.0
    shutdown_grace_s: float = 10.0
    """Seconds that running requests get when the server is told to end."""

    def __post_init__(self) -> None:
        """Refuse unknown names and what is no number of bytes."""
        _check_choice("residency", self.residency, RESIDENCIES)
        _check_choice("restore", self.restore, RESTORES)
        if self.memory not in MEMORY_SOURCES:
            parse_bytes(self.memory)
        parse_bytes(self.reserve)
        at_least("serve", 1, max_batch_size=self.max_batch_size, max_queue=self.max_queue,
                 prefill_chunk_tokens=self.prefill_chunk_tokens,
                 max_seq_len_tokens=self.max_seq_len_tokens)  # fmt: skip
        if not 0 <= self.port <= 65535:
            raise ExperimentError(f"serve.port must be from 0 to 65535, not {self.port}.")

    @property
    def memory_source(self) -> str | int:
        """A source's name, or a number of bytes."""
        return self.memory if self.memory in MEMORY_SOURCES else parse_bytes(self.memory)

    @property
    def reserve_bytes(self) -> int:
        """Bytes to leave free."""
        return parse_bytes(self.reserve)


@dataclass
class SoakConfig:
    """A long trial of a server with good and bad clients under a budget that moves."""

    requests: int = 10_000
    """Requests of all kinds."""
    max_minutes: float = 30.0
    """It ends after so many, however many requests were made."""
    clients: int = 6
    """Clients at once."""
    prompt_tokens: int = 24
    """Longest prompt, in tokens."""
    answer_tokens: int = 8
    """Longest answer, in tokens."""
    cancel_share: float = 0.08
    """Share of the requests whose stream is closed while it runs."""
    disconnect_share: float = 0.07
    """Share whose connection is cut, with or without a whole request on it."""
    bad_share: float = 0.15
    """Share that is no good request."""
    checks: int = 400
    """Answers made under one mask from start to end that are computed again afterwards."""
    phase_s: float = 2.0
    """Mean seconds between two changes of the budget."""
    least_budget: float = 0.4
    """Smallest budget that serves, as a fraction of what the dense model needs."""
    meter: str = "process"
    """What measures the model's memory: ``process``, or ``tensors`` for a tiny model."""
    hang_s: float = 90.0
    """No token and no answer for so long is a hang."""
    rss_samples: int = 60
    """How often resident memory is measured, at rest and with the dense model."""
    rss_tolerance: float = 0.02
    """By how much it may have grown between the second and the last tenth of the samples."""
    out: str | None = None
    """File that the record is appended to; null for ``soak.jsonl`` in the run folder."""

    def __post_init__(self) -> None:
        """Refuse shares and numbers that cannot be."""
        _check_choice("soak.meter", self.meter, METERS)
        at_least("soak", 1, requests=self.requests, clients=self.clients, checks=self.checks,
                 prompt_tokens=self.prompt_tokens, answer_tokens=self.answer_tokens,
                 rss_samples=self.rss_samples)  # fmt: skip
        at_least("soak", 0, cancel_share=self.cancel_share, bad_share=self.bad_share,
                 disconnect_share=self.disconnect_share)  # fmt: skip
        if self.cancel_share + self.disconnect_share + self.bad_share > 1:
            raise ExperimentError("The shares of soak together must be at most 1.")
        for name in ("max_minutes", "phase_s", "hang_s", "rss_tolerance", "least_budget"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"soak.{name} must be above 0.")
