"""Scores plans on Ray actors; the batch of a lost worker is handed out again."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rap_env.errors import WorkerError
from rap_env.extras import require_extra
from rap_env.models.device import bound_kernel_caches, use_threads
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.interface import Measured, ScoringJob
from rap_env.scoring.native_agreement import AgreementScorer
from rap_env.scoring.scorer import PlanScorer

log = logging.getLogger(__name__)

_MOST_PLANS = 64  # of a batch: what a lost worker costs, and how often a bar advances
_BATCHES_LEFT = 2  # for each worker, of equal size, in what is not handed out yet
_MOST_LOSSES = 3  # for each worker, without a finished batch between them
_PROBE_S = 5.0
_OBJECT_STORE_BYTES = 2**27  # texts and losses; Ray would reserve a third of the memory


class ScoringWorker:
    """Scores in a process of its own, with the scorer of the last text; writes no store."""

    def __init__(self, open_model: Callable[[], ElasticLLM], threads: int) -> None:
        self._open_model, self._threads = open_model, threads
        self._last: tuple[Any, PlanScorer] | None = None

    def load(self) -> None:
        """Load the model."""
        bound_kernel_caches()
        use_threads(self._threads)
        self._llm = self._open_model()

    def measure(self, job: ScoringJob, plans: Sequence[Plan]) -> Measured:
        """Score plans as the job says."""
        asked = job.options, job.context, job.compare  # the context has the hash of the text
        if self._last is None or asked != self._last[0]:
            if self._last is not None:
                self._last[1].release()
            tokens = torch.tensor(job.tokens)  # a copy: Ray's arrays are read-only
            make = AgreementScorer if job.compare else PlanScorer
            self._last = asked, make(self._llm, tokens, **job.options)
            _check_context(self._last[1], job)
        scorer = self._last[1]
        before = scorer.runner.block_runs
        scorer.nll_many(plans)
        values = {plan: scorer.window_nll(plan) for plan in plans}
        agreements = {}
        if isinstance(scorer, AgreementScorer):
            agreements = {plan: scorer.agreement(plan) for plan in values}
        return Measured(plans, values, scorer.runner.block_runs - before, agreements)


def _check_context(scorer: PlanScorer, job: ScoringJob) -> None:
    here, there = scorer.context, job.context
    different = [key for key in there if here.get(key) != there[key]]
    if different:
        shown = "; ".join(f"{key}: {here.get(key)!r}, not {there[key]!r}" for key in different)
        raise WorkerError(
            f"A worker on {platform.node()} would give other scores than this process ({shown}). "
            "All machines need the same model, versions, kind of processor and threads."
        )


class WorkerPool:
    """Ray actors that score plans for the scorers of one model.

    Each loads the model when the first batch is handed out, and ends with this process.
    Scores equal those of this process bit for bit on a CPU: each plan has its own batch, and
    a worker has as many threads of torch as this process had when the pool was made; let
    workers times threads be at most the number of cores. The batch of a worker that dies is
    handed out again; a new worker starts where the cluster has room.

    Args:
        open_model: Loads the model, such as ``functools.partial(load_llm, ...)``; name the
            device and the dtype, because ``"auto"`` may be another one on another machine. A
            path must hold on every machine.
        count: Number of workers.
        address: ``HOST:PORT`` of a running cluster, or ``"auto"`` for the one that this
            machine belongs to; None starts Ray on this machine, unless this process uses it
            already.
        gpu: Whether each worker needs a GPU; workers share GPUs where there are fewer.

    Raises:
        MissingDependencyError: Ray is not installed.
        WorkerError: Nothing answers at the address.
    """

    def __init__(
        self,
        open_model: Callable[[], ElasticLLM],
        count: int,
        *,
        address: str | None = None,
        gpu: bool = False,
    ) -> None:
        self.count, self._address, self._gpu = count, address, gpu
        self._arguments = open_model, torch.get_num_threads()
        require_extra("ray", "Scoring on several workers")
        import ray

        self._ray: Any = ray
        if address not in (None, "auto"):
            _check_address(str(address))
        self._idle: list[Any] = []
        # By result: worker, batch or None (loads)
        self._running: dict[Any, tuple[Any, Any]] = {}

    def measure(self, job: ScoringJob, plans: Sequence[Plan], least: int = 1) -> Iterator[Measured]:
        """Score plans on the whole text.

        Args:
            job: The text and what to do (`PlanScorer.job`).
            plans: In the order in which they share most of their first steps.
            least: Plans that run through the model together, so that no batch shall be
                smaller.

        Yields:
            What was measured, batch by batch, in the order in which batches finish.

        Raises:
            WorkerError: Workers cannot start, die again and again, or would give other
                scores.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        batches = batches_of(plans, self.count, least)
        if not (self._idle or self._running) or not self._ray.is_initialized():
            self._start()
        exceptions, sent = self._ray.exceptions, self._ray.put(job)
        waiting, left, losses_in_a_row = deque(batches), len(batches), 0
        try:
            while left:
                while self._idle and waiting:
                    worker, batch = self._idle.pop(), waiting.popleft()
                    self._running[worker.measure.remote(sent, batch)] = worker, batch
                (finished, *_), _ = self._ray.wait(list(self._running), timeout=None)
                worker, batch = self._running.pop(finished)
                try:
                    measured = self._ray.get(finished)
                except exceptions.RayTaskError as error:  # an error of the scorer in a worker
                    raise error.cause from None
                except exceptions.RayError as error:
                    losses_in_a_row += 1
                    self._replace(worker, error, losses_in_a_row)
                    if batch is not None:
                        waiting.appendleft(batch)
                    continue
                self._idle.append(worker)
                if batch is not None:
                    left, losses_in_a_row = left - 1, 0
                    yield measured
        finally:
            if left:  # an error here, in a worker, or of the caller: nothing may still run
                self.close()

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            self._ray.kill(worker)
        self._idle, self._running = [], {}

    def _start(self) -> None:
        ray, self._idle, self._running = self._ray, [], {}
        threads = self._arguments[1]
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # else they yield to all others
            options: dict[str, Any] = {"address": self._address}
            if self._address is None:
                options = {
                    "address": "local",
                    "num_cpus": self.count * threads,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                    "include_dashboard": False,
                }
            try:
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise WorkerError(f"Cannot join the cluster at {self._address}: {error}") from error
        available = ray.cluster_resources()
        fits = self.count * threads <= available.get("CPU", 0.0)
        asked = {"num_cpus": threads if fits else 0, "scheduling_strategy": "SPREAD"}
        if self._gpu:
            gpus = int(available.get("GPU", 0))
            if not gpus:
                raise WorkerError("Workers need a GPU each, or a part of one; Ray has none.")
            asked["num_gpus"] = 1 / -(-self.count // gpus)
        self._actor = ray.remote(ScoringWorker).options(**asked)
        for _ in range(self.count):
            self._add()

    def _add(self) -> None:
        """Start a worker; it takes batches once it has loaded the model."""
        worker = self._actor.remote(*self._arguments)
        self._running[worker.load.remote()] = worker, None

    def _replace(self, worker: Any, error: Exception, losses_in_a_row: int) -> None:
        reason = str(error).strip().partition("\n")[0]
        log.warning("A scoring worker was lost (%s); a new one starts.", reason)
        self._ray.kill(worker)  # one that only lost its connection would stay otherwise
        self._add()
        if losses_in_a_row > _MOST_LOSSES * self.count:
            raise WorkerError(
                f"{losses_in_a_row} workers died one after the other; there may be too little "
                f"memory for a model each. The last error: {reason}"
            ) from error


def batches_of(plans: Sequence[Plan], workers: int, least: int = 1) -> list[Sequence[Plan]]:
    """Cut plans into batches of neighbours, large ones first, so that workers end together.

    No batch but the last one has fewer than `least` plans.
    """
    batches, start = [], 0
    while start < len(plans):
        share = -(-(len(plans) - start) // (_BATCHES_LEFT * workers))
        size = max(least, min(_MOST_PLANS, share))
        batches.append(plans[start : start + size])
        start += size
    return batches


def _check_address(address: str) -> None:
    """Check that something answers at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise WorkerError(
            f"Nothing answers at {address} ({error}); start it with `ray start --head`, or check "
            "host, port and firewall. An address is HOST:PORT (6379 by default), or auto."
        ) from error
