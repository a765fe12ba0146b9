"""Time of a decision of an exported policy, without torch: ``python -m benchmarks.decide``.

Every decision includes all of its work: the bytes of the request, its observation, and a pass
of the network for each action: a removed block, or a lowered item of a policy over levels
(with ``weights=native``). p50 and p99 are over the requests, each at the median of its
rounds. Set ``OMP_NUM_THREADS=1`` for one core: NumPy reads it at its import.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring import ModelSettings, open_model, spread, target, write_record
from experiments.study.console import run_with_settings
from rap_env.memory import MemoryModel
from rap_env.policies.loading import load_policy
from rap_env.request import Request

SHAPES = ((1, 128), (1, 2048), (4, 512), (4, 1024), (8, 1024), (8, 2048))
"""Batch size and tokens of the requests."""
BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""Budgets of each as shares of the native peak."""


@dataclass
class DecideSettings(ModelSettings):
    """Settings of this benchmark."""

    threads: int | None = 1
    policy: str = "rap-v0"
    """A packaged policy, or the path of an exported one."""
    weights: str = "bf16"
    """How the model is loaded, as the policy's was."""
    rounds: int = 9
    """Times that all requests are decided in one measurement."""


def decision_ms(settings: DecideSettings, memory: MemoryModel, call: int) -> np.ndarray:
    """Milliseconds of each decision of one measurement, (rounds, requests).

    Requests get one token longer with each decision, as live requests rarely repeat a length,
    so that no cache of the policy or of byte costs helps.
    """
    policy = load_policy(settings.policy, memory)
    milliseconds = []
    for number in range(call * settings.rounds, (call + 1) * settings.rounds):
        for (batch_size, tokens), (place, budget) in itertools.product(SHAPES, enumerate(BUDGETS)):
            longer = tokens + number * len(BUDGETS) + place
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
    p50, p99 = ([float(np.quantile(call, q)) for call in typical] for q in (0.5, 0.99))
    blocks, requests = memory.facts.num_blocks, typical[0].size
    what = f"ms of a decision on {blocks} blocks, p99 of {requests} requests"
    write_record("decide", settings, [target(what, *p99, at_most=5.0)], p50_ms=spread(p50))


if __name__ == "__main__":
    run_with_settings(DecideSettings, main)
