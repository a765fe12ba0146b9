"""Time of a decision of an exported policy, without torch: ``python -m benchmarks.decide``.

Every decision includes all of its work: the bytes of the request, its observation, and a pass of
the network for each action: a removed block, or a lowered item of a policy over levels (with
``weights=native``). Set ``OMP_NUM_THREADS=1`` for one core: NumPy reads it at its import.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from benchmarks.measuring import ModelSettings, open_model, spread
from benchmarks.record import Target, write_record
from experiments.config.common import parse_shape
from experiments.study.console import run_with_settings
from rap_env.memory import MemoryModel
from rap_env.policies.loading import load_policy
from rap_env.request import Request

_MOST_MS = 5.0


@dataclass
class DecideSettings(ModelSettings):
    """Settings of this benchmark."""

    threads: int | None = 1
    policy: str = "rap-v0"
    """A packaged policy, or the path of an exported one."""
    weights: str = "bf16"
    """How the model is loaded, as the policy's was."""
    requests: list[str] = field(
        default_factory=lambda: ["1x128", "1x2048", "4x512", "4x1024", "8x1024", "8x2048"]
    )
    """Batch size x sequence length in tokens."""
    budgets: list[float] = field(
        default_factory=lambda: [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]
    )
    """Budgets as shares of the dense peak, each combined with every request."""
    rounds: int = 9
    """Times that all requests are decided in one measurement."""


def decision_ms(settings: DecideSettings, memory: MemoryModel, call: int) -> np.ndarray:
    """Milliseconds of each decision of one measurement, (rounds, requests).

    Requests get one token longer with each decision, as live requests rarely repeat a length, so
    that no cache of the policy or of byte costs helps.
    """
    policy = load_policy(settings.policy, memory)
    shapes = [parse_shape(text) for text in settings.requests]
    milliseconds = []
    for number in range(call * settings.rounds, (call + 1) * settings.rounds):
        for batch_size, tokens in shapes:
            for place, budget in enumerate(settings.budgets):
                longer = tokens + number * len(settings.budgets) + place
                request = Request.at_fraction(memory, batch_size, longer, budget)
                began = time.perf_counter()
                policy.choose(request)
                milliseconds.append(1000 * (time.perf_counter() - began))
    return np.reshape(milliseconds, (settings.rounds, -1))


def main(settings: DecideSettings) -> None:
    """Measure, and write the record."""
    memory = MemoryModel(open_model(settings, settings.weights).facts)
    _, *calls = [decision_ms(settings, memory, call) for call in range(settings.repeats + 1)]
    typical = [np.median(call, axis=0) for call in calls]
    p99 = spread([float(np.quantile(call, 0.99)) for call in typical])
    write_record(
        "decide",
        device="cpu",
        settings=settings,
        targets=[
            Target.of(
                f"ms of a decision on {memory.facts.num_blocks} blocks, p99 of "
                f"{typical[0].size} requests",
                p99,
                at_most=_MOST_MS,
            )
        ],
        measured={
            "p50_ms": spread([float(np.median(call)) for call in typical]),
            "p99_ms": p99,
            "any_p99_ms": spread([float(np.quantile(call, 0.99)) for call in calls]),
        },
        notes=[
            "With the bytes of the request, its observation and a pass for each action.",
            f"p50 and p99 over the requests, each at the median of its {settings.rounds} rounds; "
            "any_p99 over all single decisions.",
        ],
    )


if __name__ == "__main__":
    run_with_settings(DecideSettings, main)
