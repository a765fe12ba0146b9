"""Settings of the replay on servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from experiments.config.common import Count, NotNegative, Positive, Section, among, distinct
from rap_env.serving.settings import parse_bytes

LLAMA_CACHES = {"llama_f16": "f16", "llama_q8_0": "q8_0", "llama_q4_0": "q4_0"}
"""Format of the cache, for keys and values, of each system that is llama.cpp's server."""
SERVER_SYSTEMS = ("rap", "rap_model_memory", *LLAMA_CACHES)
"""Systems of the replay on servers."""


def _size(name: str, text: Any) -> None:
    parse_bytes(name, text)


@dataclass
class ServerReplayConfig(Section):
    """A replay in real time on server processes; the arrivals are those of the section `replay`.

    All servers have one thread and greedy decoding.
    """

    section = "server_replay"
    systems: Annotated[list[Annotated[str, among(*SERVER_SYSTEMS)]], distinct] = field(
        default_factory=lambda: list(SERVER_SYSTEMS)
    )
    """Systems to run: ``rap`` (``rap serve --memory``), ``rap_model_memory`` (``rap serve
    --model-memory`` with the bytes of weights, cache and compute buffers of `llama_f16`), and
    llama.cpp's server with a cache in f16, q8_0 and q4_0. Their order is that of the first budget;
    it is reversed from each budget to the next."""
    budgets: Annotated[list[Annotated[str, _size]], distinct] = field(
        default_factory=lambda: ["180MiB", "520MiB"]
    )
    """Resident memory of the whole server process, each for one run of every system."""
    llama_server: str = "llama-server"
    """Program of llama.cpp's server: a name on PATH or a path."""
    slots: Count = 8
    """Most sequences that a server runs at a time."""
    batch_tokens: Count = 256
    """Most prompt tokens of one step."""
    max_starts: Count = 6
    """Most trial starts of llama.cpp's server in the search for its largest context."""
    spare_mib: NotNegative = 4.0
    """MiB of the budget that a trial of llama.cpp's server must leave free."""
    timeout_s: Positive = 120.0
    """Seconds from its arrival after which a client gives a request up."""
