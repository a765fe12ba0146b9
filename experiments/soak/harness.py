"""Harness of a soak test: a server, load clients, a moving budget, and checks at rest."""

from __future__ import annotations

import faulthandler
import gc
import logging
import random
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.contexts import server_settings
from experiments.soak.clients import LoadClient, Target
from experiments.soak.invariants import (
    AnswerCheck,
    check_answers,
    memory_growth,
    resident_bytes,
)
from experiments.soak.recording import (
    AnswerSample,
    RandomPlans,
    RecordingEngine,
    SoakState,
    plain_token_ids,
)
from experiments.study.run_folder import provenance
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.models.device import return_freed_memory
from rap_env.models.files.loading import load_llm
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.memory_meter import TensorMeter, process_meter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.stack import build_stack, load_served_model

log = logging.getLogger(__name__)

_HOLD_S = 0.3
_REST_TOKENS = 8
_QUIET_S = 0.3
_UNLIMITED = 2**50


class SoakHarness:
    """Runs one soak test.

    Args:
        config: All settings.
        folder: The run's folder, for the log of decisions and the stack traces of a hang.

    Raises:
        MissingDependencyError: The extra ``serve`` is not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._state = SoakState(config.soak.requests)
        self._random = random.Random(config.seed)
        self._budget_bytes = _UNLIMITED
        self._budget_lock = threading.Lock()
        settings = server_settings(config, folder)
        llm = load_served_model(settings)
        tensors = config.soak.meter == "tensors"
        self._stack = build_stack(
            settings,
            llm=llm,
            policy=RandomPlans(MemoryModel(llm), config.seed),
            memory=GivenMemory(lambda: self._budget_bytes, limit_bytes=_UNLIMITED),
            engine_class=RecordingEngine,
            meter=TensorMeter(llm) if tensors else process_meter(llm),
            hold_s=_HOLD_S,
        )
        assert isinstance(self._stack.engine, RecordingEngine)
        self._engine = self._stack.engine
        self._engine.state = self._state
        self._sample = self._engine.sample = AnswerSample(config.soak.checks, config.seed)
        self._token_ids = plain_token_ids(llm)
        longest = config.soak.prompt_tokens + 2 * config.soak.answer_tokens
        everything = BatchShape(settings.max_batch_size, longest)
        self._full_bytes = self._engine.controller.estimator.peak_bytes(BlockMask(), everything)
        self._rest_prompt = self._random.sample(self._token_ids, min(12, len(self._token_ids)))
        self._rss: list[int] = []
        self._rest_answers: set[tuple[int, ...]] = set()
        self._budget_changes = 0
        self._hung = False
        self._unfinished = 0
        self._check = AnswerCheck()
        self._seconds = 0.0

    def run(self) -> dict[str, Any]:
        """Serve, send requests, check the answers, and return the record."""
        from rap_env.serving.server import BackgroundServer

        started = time.monotonic()
        server = BackgroundServer(self._stack.app)
        with server:
            target = Target(
                server.url,
                self._stack.settings.served_name,
                self._token_ids,
                self._engine.llm.tokenizer,
                self._sample,
            )
            self._apply_load(target, started)
            self._seconds = time.monotonic() - started
            self._await_rest()
            if self._hung:
                self._engine.close(timeout_s=5)
        self._unfinished = len(self._sample.unfinished())
        self._stack.close()
        if not self._hung:
            model = self._config.model
            fresh = load_llm(
                model.name, device=model.device, dtype=model.dtype, weights=model.weights
            )
            self._check = check_answers(fresh, self._sample.kept)
        return self._record()

    def _apply_load(self, target: Target, started: float) -> None:
        soak, state = self._config.soak, self._state
        clients = [
            threading.Thread(
                target=LoadClient(state, target, soak, self._config.seed).run,
                name=f"client-{number}",
                daemon=True,
            )
            for number in range(soak.clients)
        ]
        budget = threading.Thread(target=self._move_budget, name="budget", daemon=True)
        self._measure_at_rest()
        controller = self._engine.controller
        # The memory of libraries and clients in this process does not depend on the plan.
        self._full_bytes += max(0, controller.monitor.used_bytes - controller.monitor.held.total)
        for thread in (*clients, budget):
            thread.start()
        last_s, last_made = started, 0
        every, pause_s = soak.requests / soak.rss_samples, soak.max_minutes * 60 / soak.rss_samples
        while any(client.is_alive() for client in clients) and not self._hung:
            time.sleep(0.1)
            now = time.monotonic()
            if now - started > soak.max_minutes * 60:
                state.stop.set()
            if now - last_s >= pause_s or state.made - last_made >= every:
                self._measure_at_rest()
                last_s, last_made = time.monotonic(), state.made
                self._log_progress(now - started)
            self._check_hang()
        state.stop.set()
        for thread in (*clients, budget):
            thread.join(timeout=5)

    def _check_hang(self) -> None:
        silent_s = time.monotonic() - self._state.progress_s
        if self._state.in_flight and silent_s > self._config.soak.hang_s:
            self._hang(f"No progress for {silent_s:.0f} s with requests in flight.")

    def _hang(self, problem: str) -> None:
        self._hung = True
        self._state.problem(problem)
        with (self._folder / "hang.txt").open("w") as file:
            faulthandler.dump_traceback(file)

    def _move_budget(self) -> None:
        soak = self._config.soak
        while not self._state.stop.wait(self._random.expovariate(1 / soak.phase_s)):
            drawn = self._random.random()
            share = 1.2 if drawn < 0.25 else self._random.uniform(soak.least_budget, 1.0)
            with self._budget_lock:  # not while memory is measured
                self._budget_changes += 1
                if drawn > 0.97:  # for a moment no request fits
                    self._budget_bytes = 1
                    self._state.stop.wait(0.5)
                self._budget_bytes = int(share * self._full_bytes)

    def _measure_at_rest(self) -> None:
        """Measure resident memory and one answer with the dense model and no other request."""
        hang_s = self._config.soak.hang_s
        with self._budget_lock, self._state.paused(hang_s) as idle:
            if not idle:
                return self._hang(f"Requests did not end within {hang_s:.0f} s.")
            engine, before, self._budget_bytes = self._engine, self._budget_bytes, _UNLIMITED
            if not self._wait_until_quiet(hang_s):
                return self._hang(f"The model was not dense and idle within {hang_s:.0f} s.")
            self._rest_answers.add(self._rest_answer())
            gc.collect()
            with engine.llm.exclusive():
                return_freed_memory()
                self._rss.append(resident_bytes())
            self._budget_bytes = before
        return None

    def _wait_until_quiet(self, timeout_s: float) -> bool:
        """Wait until the model is dense and no request has run for a moment.

        A request of a disconnected client runs until the server notices the disconnect.
        """
        deadline = quiet_s = time.monotonic()
        deadline += timeout_s
        while (now := time.monotonic()) < deadline:
            stats = self._engine.stats()
            if self._engine.llm.plan or stats.running or stats.queued:
                quiet_s = now
            if now - quiet_s > _QUIET_S:
                return True
            time.sleep(0.02)
        return False

    def _rest_answer(self) -> tuple[int, ...]:
        """Return the dense model's answer to a fixed prompt."""
        params = SamplingParams(max_new_tokens=_REST_TOKENS)
        handle = self._engine.submit(self._rest_prompt, params)
        handle.result(self._config.soak.hang_s)
        return tuple(handle.token_ids)

    def _await_rest(self) -> None:
        """Wait for the requests of disconnected clients to end."""
        self._budget_bytes = _UNLIMITED
        deadline = time.monotonic() + self._config.soak.hang_s
        while not self._hung and self._sample.unfinished():
            if time.monotonic() > deadline:
                self._hang("Requests of disconnected clients did not end.")
            time.sleep(0.05)

    def _log_progress(self, seconds: float) -> None:
        stats = self._engine.stats()
        log.info(
            "%d requests in %.0f s; %d answers, %d switches, %.1f MiB resident at rest, "
            "%d problems",
            self._state.made,
            seconds,
            stats.served,
            self._engine.controller.plans.switches,
            self._rss[-1] / 2**20,
            self._state.problem_count,
        )

    def _record(self) -> dict[str, Any]:
        """Return the results as plain values."""
        soak, state, stats = self._config.soak, self._state, self._engine.stats()
        growth = memory_growth(self._rss)
        checks = {
            "every_request_ended": self._unfinished == 0,
            "no_hang": not self._hung,
            "statuses_and_answers_right": state.problem_count == 0,
            "sample_agrees": self._check.wrong_answers == 0 and self._check.answers > 0,
            "dense_answer_always_the_same": len(self._rest_answers) == 1,
            "memory_flat": growth <= soak.rss_tolerance,
        }
        return {
            "model": self._engine.llm.name,
            "requests": state.made,
            "seconds": round(self._seconds, 1),
            "clients": soak.clients,
            "kinds": dict(sorted(state.kinds.items())),
            "outcomes": dict(sorted(state.outcomes.items())),
            "answers": {
                "served": stats.served, "cancelled": stats.cancelled, "refused": stats.refused,
                "failed": stats.failed, "preemptions": stats.preemptions, "tokens": stats.tokens,
                "under_one_mask": self._sample.eligible, "mask_changed": self._sample.changed,
            },
            "budget_changes": self._budget_changes,
            "switches": self._engine.controller.plans.switches,
            "masks": len(self._sample.plans),
            "agreement": asdict(self._check),
            "rss_bytes": {"first": self._rss[0], "last": self._rss[-1], "growth": growth,
                          "samples": self._rss},
            "checks": checks,
            "passed": all(checks.values()),
            "problem_count": state.problem_count,
            "problems": state.problems,
            "provenance": provenance({"run": self._config.seed}),
        }  # fmt: skip
