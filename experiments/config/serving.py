"""Settings of the server and of the soak test."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from experiments.config.common import at_least
from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError
from rap_env.serving.settings import ServerSettings

METERS = ("process", "tensors")

_ELSEWHERE = ("model", "device", "dtype", "threads")  # from the sections model and config


def serve_defaults() -> dict[str, Any]:
    """Defaults of the section ``serve``: those of `ServerSettings`, with a log of decisions.

    ``decisions: default`` is ``decisions.jsonl`` in the run folder.
    """
    values = asdict(ServerSettings()) | {"decisions": "default"}
    return {name: value for name, value in values.items() if name not in _ELSEWHERE}


@dataclass
class SoakConfig:
    """A soak test: valid and invalid requests to a server whose memory budget changes."""

    requests: int = 10_000
    """Number of requests of all kinds."""
    max_minutes: float = 30.0
    """Minutes after which it ends, even if fewer requests were made."""
    clients: int = 6
    """Number of concurrent clients."""
    prompt_tokens: int = 24
    """Longest prompt, in tokens."""
    answer_tokens: int = 8
    """Longest answer, in tokens."""
    cancel_share: float = 0.08
    """Share of requests whose stream the client closes while it runs."""
    disconnect_share: float = 0.07
    """Share of requests whose client disconnects, before or after the request is complete."""
    bad_share: float = 0.15
    """Share of invalid requests."""
    checks: int = 400
    """Answers generated under one mask that are recomputed and compared afterwards."""
    phase_s: float = 2.0
    """Mean seconds between changes of the budget."""
    least_budget: float = 0.4
    """Smallest budget, as a fraction of what the dense model needs."""
    meter: str = "process"
    """How memory is measured: ``process``, or ``tensors`` for a tiny model."""
    hang_s: float = 90.0
    """Seconds without a token or an answer that count as a hang."""
    rss_samples: int = 60
    """Number of measurements of resident memory, each idle and with the dense model."""
    rss_tolerance: float = 0.02
    """Allowed relative growth between the second and the last tenth of the samples."""
    out: str | None = None
    """File that the record is appended to; null for ``soak.jsonl`` in the run folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.meter not in METERS:
            raise UnknownNameError("soak.meter", self.meter, METERS)
        at_least("soak", 1, requests=self.requests, clients=self.clients, checks=self.checks,
                 prompt_tokens=self.prompt_tokens, answer_tokens=self.answer_tokens,
                 rss_samples=self.rss_samples)  # fmt: skip
        at_least("soak", 0, cancel_share=self.cancel_share, bad_share=self.bad_share,
                 disconnect_share=self.disconnect_share)  # fmt: skip
        if self.cancel_share + self.disconnect_share + self.bad_share > 1:
            raise ExperimentError("The sum of the shares of soak must be at most 1.")
        for name in ("max_minutes", "phase_s", "hang_s", "rss_tolerance", "least_budget"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"soak.{name} must be above 0.")
