"""Hands batches of masks and plans to Ray actors; a batch of a lost worker is handed out again."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rap_env.errors import InvalidRequestError, MissingDependencyError, WorkerError
from rap_env.plan import MaskOrPlan
from rap_env.scoring.workers.job import Measured, ScoringJob
from rap_env.scoring.workers.worker import OpenModel, ScoringWorker

log = logging.getLogger(__name__)

_MOST_PLANS = 64  # of a batch: what a lost worker costs, and how often a bar advances
_BATCHES_LEFT = 2  # for each worker, of equal size, in what is not handed out yet
_MOST_LOSSES = 3  # for each worker, without a finished batch between them
_LOADING, _DROPPED = -1, -2  # in the place of a batch's number
_PROBE_S = 5.0
_CONNECT_S = 25.0
_PATIENCE_S = 30.0
_OBJECT_STORE_BYTES = 2**27  # texts and losses; Ray would reserve a third of the memory


class WorkerPool:
    """Workers that score masks and plans for the scorers of one model: Ray actors.

    Each worker loads the model when the first batch is handed out, and ends with this process.
    Scores equal those of this process bit for bit on a CPU, because each mask has its own batch and
    a worker has as many threads of torch as this process had when the pool was made; a worker for
    which anything that determines scores differs (see `MaskScorer.context`) is an error. This
    process alone writes the store.

    A worker that dies, or whose node does, loses the batch that it was measuring: that batch is
    handed out again, and a new worker starts where the cluster has room.

    Args:
        open_model: Loads the model, such as ``functools.partial(load_llm, ...)``; name the device
            and the dtype, because ``"auto"`` may be another one on another machine. A path must
            hold on every machine.
        count: Number of workers.
        address: ``HOST:PORT`` of a running cluster, or ``"auto"`` for the one that runs on this
            machine; None starts Ray on this machine. A process that uses Ray already keeps what it
            uses.
        gpu: Whether each worker needs a GPU; workers share GPUs where there are fewer.

    Attributes:
        losses: Workers that were lost so far.

    Raises:
        InvalidRequestError: The count is no whole number of at least 1, or the address has another
            form.
        MissingDependencyError: Ray is not installed.
        WorkerError: Nothing answers at the address.
    """

    def __init__(
        self, open_model: OpenModel, count: int, *, address: str | None = None, gpu: bool = False
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidRequestError(
                f"The number of workers must be a whole number of at least 1, not {count!r}."
            )
        self.count = count
        self.losses = 0
        self._open_model = open_model
        self._gpu = gpu
        self._threads = torch.get_num_threads()
        self._address = address
        self._ray = _import_ray()
        if address not in (None, "auto"):
            host, port = _parse_address(str(address))
            if not self._ray.is_initialized():
                _probe(host, port)  # now, not after what comes before the first batch
        self._actor: Any = None
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}  # by result: worker, number of the batch
        self._sent: WeakKeyDictionary[ScoringJob, Any] = WeakKeyDictionary()

    def measure(
        self, job: ScoringJob, plans: Sequence[MaskOrPlan], least: int = 1
    ) -> Iterator[Measured]:
        """Score masks and plans on the whole text.

        Args:
            job: The text (`MaskScorer.job`).
            plans: In the order in which they share most of their first steps.
            least: Plans that run through the model together, so that no batch shall be smaller.

        Yields:
            What was measured, batch by batch, in the order in which batches finish.

        Raises:
            WorkerError: Workers cannot start, die again and again, or would give other scores.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        yield from self._run(job, "measure", batches_of(plans, self.count, least))

    def search(
        self, job: ScoringJob, plans: Sequence[MaskOrPlan], near: MaskOrPlan | None
    ) -> Iterator[Measured]:
        """Find the best of some masks or plans, likely winners first: each worker takes a part.

        Yields and raises as `measure` does. The best one is among those measured.
        """
        parts = [plans[start :: self.count] for start in range(min(self.count, len(plans)))]
        yield from self._run(job, "search", parts, near)

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            self._ray.kill(worker)
        self._idle, self._running, self._actor = [], {}, None
        self._sent.clear()

    def _run(
        self, job: ScoringJob, method: str, batches: Sequence[Any], *arguments: Any
    ) -> Iterator[Measured]:
        """Hand batches out, and yield the results as they arrive."""
        ray = self._ray
        if self._actor is None or not ray.is_initialized():
            self._start()
        for result, (worker, number) in self._running.items():
            if number >= 0:  # of an earlier call that ended with an error
                self._running[result] = worker, _DROPPED
        sent = self._send(job)
        todo = deque(range(len(batches)))
        left, in_a_row = len(batches), 0
        while left:
            while self._idle and todo:
                worker, number = self._idle.pop(), todo.popleft()
                result = getattr(worker, method).remote(sent, batches[number], *arguments)
                self._running[result] = worker, number
            finished, _ = ray.wait(list(self._running), timeout=_PATIENCE_S)
            if not finished:
                self._report_waiting()
                continue
            worker, number = self._running.pop(finished[0])
            try:
                found = ray.get(finished[0])
            except _lost(ray) as error:
                in_a_row += 1
                self._replace(worker, error)
                if in_a_row > _MOST_LOSSES * self.count:
                    raise WorkerError(
                        f"{in_a_row} workers died one after the other; there may be too little "
                        f"memory for a model each. The last error: {_first_line(error)}"
                    ) from error
                if number >= 0:
                    todo.appendleft(number)
                continue
            except ray.exceptions.RayTaskError as error:
                if number == _LOADING:
                    self.close()
                else:
                    self._idle.append(worker)
                if number == _DROPPED:
                    continue
                raise error.cause from None
            self._idle.append(worker)
            if number >= 0:
                left, in_a_row = left - 1, 0
                yield found

    def _start(self) -> None:
        """Connect to Ray and start all workers."""
        ray = self._ray
        self._idle, self._running = [], {}
        self._sent.clear()
        if not ray.is_initialized():
            self._connect()
        self._actor = ray.remote(ScoringWorker).options(**self._resources())
        for _ in range(self.count):
            self._add()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers would yield to all others
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            self._ray.init(
                address="local",
                num_cpus=self.count * self._threads,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
            return
        try:
            self._ray.init(address=self._address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise WorkerError(
                f"Cannot join the Ray cluster at {self._address}: {_first_line(error)}"
            ) from error

    def _resources(self) -> dict[str, Any]:
        """What each worker asks of the cluster; warns if there are more workers than cores."""
        have = self._ray.cluster_resources()
        cores = have.get("CPU", 0.0) if self._address else len(os.sched_getaffinity(0))
        wanted = self.count * self._threads
        if wanted > cores:
            log.warning(
                "%d scoring worker%s of %d thread%s share %d cores and slow each other down; "
                "let workers times threads be at most the number of cores.",
                self.count, "s" * (self.count > 1), self._threads, "s" * (self._threads > 1), cores,
            )  # fmt: skip
        fits = wanted <= have.get("CPU", 0.0)
        asked: dict[str, Any] = {
            "num_cpus": self._threads if fits else 0,
            "scheduling_strategy": "SPREAD",
        }
        if self._gpu:
            gpus = int(have.get("GPU", 0))
            if not gpus:
                raise WorkerError("Workers need a GPU each, or a part of one; Ray has none.")
            asked["num_gpus"] = 1 / -(-self.count // gpus)
        return asked

    def _add(self) -> None:
        """Start a worker; it takes batches once it has loaded the model."""
        worker = self._actor.remote(self._open_model, self._threads)
        self._running[worker.load.remote()] = worker, _LOADING

    def _replace(self, worker: Any, error: Exception) -> None:
        self.losses += 1
        log.warning("A scoring worker was lost (%s); a new one starts.", _first_line(error))
        self._ray.kill(worker)  # one that only lost its connection would stay otherwise
        self._add()

    def _report_waiting(self) -> None:
        """Log that nothing progresses because no worker has started."""
        if all(number == _LOADING for _, number in self._running.values()):
            log.warning(
                "No scoring worker has started yet: %d are waiting for room in the cluster, or "
                "load the model.", len(self._running),
            )  # fmt: skip

    def _send(self, job: ScoringJob) -> Any:
        """Ray's reference of a job, which is sent once."""
        if job not in self._sent:
            self._sent[job] = self._ray.put(job)
        return self._sent[job]


def batches_of(
    plans: Sequence[MaskOrPlan], workers: int, least: int = 1
) -> list[Sequence[MaskOrPlan]]:
    """Cut plans into batches of neighbours, large ones first, so that workers end together.

    Args:
        plans: In the order in which they share most of their first steps.
        workers: Number of workers.
        least: Plans that run through the model together; no batch but the last one has fewer.
    """
    batches, start = [], 0
    while start < len(plans):
        share = -(-(len(plans) - start) // (_BATCHES_LEFT * workers))
        size = max(least, min(_MOST_PLANS, share))
        batches.append(plans[start : start + size])
        start += size
    return batches


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("ray", "Scoring on several workers", "ray") from None
    return ray


def _lost(ray: Any) -> tuple[type[Exception], ...]:
    """The errors of a worker or node that died."""
    found = ray.exceptions
    return (
        found.RayActorError, found.ObjectLostError, found.OutOfMemoryError,
        found.WorkerCrashedError,
    )  # fmt: skip


def _parse_address(address: str) -> tuple[str, int]:
    """Host and port of an address; an `InvalidRequestError` if it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InvalidRequestError(
            f"The address of a Ray cluster is HOST:PORT (port 6379 unless `ray start` was given "
            f"another one) or auto, not {address!r}."
        )
    return host, int(port)


def _probe(host: str, port: int) -> None:
    """Check that a Ray cluster answers.

    Ray itself tries for many minutes where nothing answers, or something else does.

    Raises:
        WorkerError: No cluster answers.
    """
    address = f"{host}:{port}"
    remedy = "start it with `ray start --head`, or check host, port and firewall"
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise WorkerError(f"Nothing answers at {address} ({error}); {remedy}.") from error
    code = f"import ray; ray.init(address={address!r}, log_to_driver=False)"
    try:
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=_CONNECT_S, check=True
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(
            f"What answers at {address} is no Ray cluster, or it did not let this machine join "
            f"within {_CONNECT_S:.0f} s; {remedy}."
        ) from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise WorkerError(
            f"Cannot join the Ray cluster at {address}: {''.join(last) or 'no reason was given'}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
