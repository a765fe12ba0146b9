"""Random schedules of an engine on a virtual clock: budgets, requests, other memory, failures."""

import functools
import random

import torch

from rap_env.errors import InfeasibleBudgetError, QueueFullError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.runtime.memory_estimator import BatchShape, PassSize
from tests.policies.test_knapsack import costs
from tests.runtime.harness import PLENTY, Harness, greedy, prompt
from tests.tiny import tiny_llm

LAYERS = 2
MOST_STALLED_S = 2.0
TURNS = 80


def knapsack():
    memory = MemoryModel(tiny_llm(layers=LAYERS))
    return KnapsackPolicy(memory, costs(memory.facts, caches=("int8", "int4")))


class Schedule:
    """One random schedule; `run` raises an `AssertionError` where the engine makes no progress."""

    def __init__(self, seed: int, policy) -> None:
        self.seed, self.draw = seed, random.Random(seed)
        draw = self.draw
        self.harness = Harness(
            layers=LAYERS,
            policy=policy,
            max_delta_nll=draw.choice([None, None, 1.0, 4.0]),
            guard_order=draw.choice([None, ()]),
            hold_s=draw.choice([0.0, 0.5, 2.0]),
        )
        self.controller = self.harness.controller
        self.engine = self.harness.engine(
            max_batch_size=draw.choice([1, 2, 4]),
            max_queue=8,
            prefill_chunk_tokens=draw.choice([4, 16]),
            queue_timeout_s=draw.choice([None, 15.0]),
        )
        self.top = self.harness.need(Plan(), BatchShape(4, 40))
        self.least = self.harness.need(self.harness.everything, BatchShape(1, 4))
        self.handles, self.fitting_since_s, self.failing = [], None, None
        forward = self.harness.llm.model.forward

        @functools.wraps(forward)
        def failing(*args, **kwargs):
            kind, self.failing = self.failing, None
            output = forward(*args, **kwargs)
            if kind is not None:
                raise kind("a failure of the schedule")
            return output

        self.harness.llm.model.forward = failing

    def run(self, turns: int = TURNS) -> int:
        """Run the schedule, and then with plenty of memory until all has ended; turns that ran."""
        worked = 0
        for _ in range(turns):
            self._event()
            worked += self._turn()
        harness, self.failing = self.harness, None
        harness.budget_bytes, harness.meter.noise_bytes = PLENTY, 0
        for _ in range(40 * turns):
            if all(handle.done for handle in self.handles):
                break
            worked += self._turn()
        unfinished = sum(not handle.done for handle in self.handles)
        assert not unfinished, f"seed {self.seed}: {unfinished} requests never ended"
        assert harness.llm.held_bytes.kv_cache == 0, f"seed {self.seed}: caches were left"
        return worked

    def _event(self) -> None:
        draw, harness = self.draw, self.harness
        kind = draw.random() * 2.5
        if kind < 0.12:
            share = draw.choice([0.0, 1.2, *(draw.random(),) * 4])
            harness.budget_bytes = int(self.least + share * (self.top - self.least))
        elif kind < 0.3:
            floor = draw.choice([None, None, 0.5, 2.0])
            try:
                handle = self.engine.submit(
                    prompt(draw.randint(1, 30), draw.randrange(99)),
                    greedy(draw.randint(1, 20), max_delta_nll=floor),
                )
                self.handles.append(handle)
            except (InfeasibleBudgetError, QueueFullError):
                pass
        elif kind < 0.36:  # other memory of the process comes and goes
            harness.meter.noise_bytes = draw.choice([0, draw.randrange(self.top // 3)])
        elif kind < 0.4:
            self.failing = draw.choice([torch.OutOfMemoryError, RuntimeError])
        elif kind < 0.42 and self.handles:
            draw.choice(self.handles).cancel()
        elif kind < 0.5:
            harness.time_s += draw.uniform(0, 30)
            self.fitting_since_s = None  # nothing was asked of the engine meanwhile

    def _turn(self) -> bool:
        worked = self.engine.step()
        self.harness.time_s += 0.05 if worked else 0.1
        now = self.harness.time_s
        if worked or not self._one_fits():
            self.fitting_since_s = None
        elif self.fitting_since_s is None:
            self.fitting_since_s = now
        stalled_s = 0.0 if self.fitting_since_s is None else now - self.fitting_since_s
        assert stalled_s <= MOST_STALLED_S, (
            f"seed {self.seed}: nothing has run for {stalled_s:.1f} s, and a plan fits"
        )
        return worked

    def _one_fits(self) -> bool:
        """Whether a plan fits one waiting request alone, by bytes that are known and measured."""
        waiting = self.engine._queue.waiting
        if not waiting:
            return False
        estimator, chooser = self.controller.estimator, self.controller.chooser
        for sequence in waiting:
            shape = self.engine._scheduler.batch.shape_of([], sequence)
            first = estimator.pass_estimate(Plan(), shape, PassSize(1, 1)).workspace
            excess = max(0, first - estimator.workspace_bytes(shape))
            limit = self.harness.budget_bytes - self.harness.meter.noise_bytes - excess
            if chooser.could_fit(shape, limit):
                return True
        return False
