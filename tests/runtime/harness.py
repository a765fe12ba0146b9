"""A harness: a tiny live model with a budget, a clock and a meter that a test sets."""

import os
import random
import time

import torch

from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import OrderPolicy, StaticPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decision import Admit, Snapshot
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import EMPTY_BATCH, UNKNOWN_PASS, BatchShape, MemoryEstimator
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.runtime.records import ControllerSettings, EngineSettings
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.scheduler import kept_sequences
from tests.tiny import VOCAB_SIZE, tiny_llm

PLENTY = 10**9
SHAPE = BatchShape(4, 40)
ORDER = (5, 0, 3, 2, 1, 4)


def set_status(folder, now_mib, mark_mib=900):
    """Write resident memory as the kernel reports it, at once: a thread may read it meanwhile."""
    text = f"Name: x\nVmHWM:  {mark_mib * 1024} kB\nVmRSS:\t{now_mib * 1024} kB\n"
    file = os.open(folder / "status", os.O_WRONLY | os.O_CREAT)
    os.pwrite(file, text.ljust(200).encode(), 0)
    os.close(file)


class NoisyMeter(TensorMeter):
    """Tensor bytes plus unpredicted `noise_bytes`."""

    noise_bytes = 0

    def used_bytes(self) -> int:
        return super().used_bytes() + self.noise_bytes

    def peak_bytes(self) -> int:
        return max(super().peak_bytes(), self.used_bytes())


class Harness:
    """The model, its controller, and on request an engine."""

    def __init__(
        self,
        *,
        name="llama",
        layers=3,
        policy=None,
        disk=True,
        budget=PLENTY,
        mask=Plan(),
        meter=NoisyMeter,
        clock=None,
        positions=64,
        llm=None,
        **settings,
    ) -> None:
        self.llm = llm or tiny_llm(name, layers=layers, positions=positions)
        self.llm.set_residency("offload")
        self.disk = disk
        self.llm.apply(mask)
        self.budget_bytes = budget
        self.time_s = 0.0
        self.meter = meter(self.llm)
        self.estimator = MemoryEstimator(self.llm)
        self.policy = policy or StaticPolicy(Plan(), "dense")
        self.controller = RuntimeController(
            self.llm,
            self.policy,
            lambda: self.budget_bytes,
            ControllerSettings(**settings),
            meter=self.meter,
            clock=clock or (lambda: self.time_s),
        )
        self.kept = kept_sequences(self.controller, EngineSettings(keep=False))
        self.records = []

    @property
    def mask(self) -> Plan:
        return Plan(self.llm.plan.removed)

    @property
    def everything(self) -> Plan:
        return Plan.removing(*range(self.llm.num_blocks))

    def set_plan(self, plan: Plan) -> None:
        """Let a plan be the present one, and the one that the policy chooses."""
        self.policy.plan = plan
        self.llm.apply(plan)

    def need(self, mask, shape: BatchShape) -> int:
        return self.estimator.peak_bytes(mask, shape)

    def check(self, shape, next_pass=UNKNOWN_PASS, **known) -> bool:
        """Whether a batch may go on, with whatever plan."""
        asked = Snapshot(running=shape, next_pass=next_pass, rows_plan=self.llm.plan, **known)
        return self.controller.act(asked, self.kept) is None

    def admit(self, shape, running=EMPTY_BATCH) -> bool:
        """Whether a request may join, which makes a batch of this shape."""
        asked = Snapshot(running=running, joined=shape)
        return isinstance(self.controller.act(asked, self.kept), Admit)

    def engine(self, **settings) -> Engine:
        engine = Engine(self.controller, EngineSettings(**settings))
        engine.observers.append(self.records.append)
        if not self.disk:  # as with residency drop
            engine._scheduler._kept.files.folder = None
            engine._scheduler.batch.clear()
        return engine

    def run(self, engine: Engine, *, turns=500, seconds=0.1, before=None) -> int:
        """Run turns until nothing is left to do, and return their number."""
        for turn in range(turns):
            if before is not None:
                before(turn)
            if not engine.step():
                return turn
            self.time_s += seconds
        raise AssertionError(f"still busy after {turns} turns")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def greedy(new: int, **settings) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, **settings)


@torch.no_grad()
def alone(llm, prompt_ids, new: int, mask=Plan()) -> list[int]:
    """Tokens of greedy decoding without a cache, a batch or an engine."""
    ids = list(prompt_ids)
    with llm.applied(mask):
        for _ in range(new):
            ids.append(int(llm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


class FakePolicy(Policy):
    """A fake policy that returns a given mask, or raises, and records the requests."""

    name = "fake"

    def __init__(self, mask) -> None:
        self.mask = mask
        self.asked = []

    def choose(self, request):
        self.asked.append(request)
        if isinstance(self.mask, Exception):
            raise self.mask
        return self.mask


def ordered(**settings) -> Harness:
    """A harness whose policy removes blocks in a known order until the request fits."""
    harness = Harness(guard_order=ORDER, **settings)
    harness.controller.chooser.policy = OrderPolicy(harness.estimator.memory, ORDER)
    return harness


def between(harness, count: int, shape=SHAPE) -> int:
    """A budget for which the first `count` blocks of the order must be removed."""
    most = harness.need(Plan.removing(*ORDER[:count]), shape)
    less = harness.need(Plan.removing(*ORDER[: count - 1]), shape) if count else most + 100
    return (most + less) // 2


def serve_while_the_budget_jumps(harness, engine, least: int, most: int) -> list:
    """Answer requests while the budget jumps between two limits, then with plenty."""
    harness.controller.monitor.max_budget_bytes = PLENTY
    draw, handles = random.Random(0), []
    for turn in range(300):
        if turn % 8 == 0:
            harness.budget_bytes = PLENTY if turn > 150 else draw.randint(least, most)
        if turn < 80 and turn % 4 == 0:
            handles.append(engine.submit(prompt(draw.randint(1, 20), turn), greedy(20)))
        engine.step()
        harness.time_s += 0.1
    assert all(handle.reason == "length" for handle in handles)
    return handles


def preempt(engine) -> None:
    """Put the newest request that runs back into the queue."""
    engine._scheduler._preempt(engine._scheduler.batch.newest)


def steps(engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def eventually(true, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
