"""How many threads torch uses: the number asked for, or the fastest one, kept per comparison."""

from __future__ import annotations

from pathlib import Path

from experiments.config import Config
from rap_env.artifacts import atomic_write

_FILE = "threads.txt"


def set_threads(config: Config) -> None:
    """Set torch's threads before anything is measured.

    Rounding depends on the number of threads, so all stages of a comparison, and a
    comparison that goes on after a stop, use the number that its first stage chose.
    """
    from rap_env.llm.device import bound_kernel_caches, use_threads

    bound_kernel_caches()  # before the first product, which may be the measurement of threads
    use_threads(config.threads or _kept(config.root / _FILE))


def _kept(path: Path) -> int:
    """The number that this comparison uses; measured if it has none yet."""
    from rap_env.llm.device import fastest_threads

    try:
        return max(1, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        threads = fastest_threads()
    with atomic_write(path) as file:
        file.write(f"{threads}\n".encode())
    return threads
