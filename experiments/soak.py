"""``python -m experiments.soak``: soak test of a server under load and a moving budget.

Clients send valid and invalid requests, cancel and disconnect, while budget and plans change. A
sample of the answers is recomputed with a fresh model. The record is a line of JSON, and the exit
status 1 if one did not end or differs, a status code is unexpected, a pass was below the floor of
quality, memory grew, or the server hung.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from experiments.config import Config
from experiments.contexts import server_settings
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.records import append_record
from experiments.study.run_folder import provenance
from rap_env.blocks import block_name
from rap_env.memory import MemoryModel
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.device import return_freed_memory
from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan, cache_name
from rap_env.policies.base import Policy
from rap_env.request import Request
from rap_env.runtime.batch_shape import BatchShape
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import TensorMeter, process_meter, resident_bytes
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.metrics import StepRecord
from rap_env.runtime.request_handle import EndEvent, Event, RequestHandle
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.stack import build_stack, load_served_model

REJECTED_CODES = ("insufficient_memory", "insufficient_quality", "rate_limit_exceeded")
"""Codes of valid answers when memory is short."""
UNLIMITED_BYTES = 2**50
TIE_ROUNDINGS, MIN_TOLERANCE = 4.0, 1e-3
"""Logits are equal within so many roundings of the largest one: batches sum in another order."""
_INVALID: tuple[tuple[int, dict[str, Any]], ...] = (
    (404, {"model": "another"}), (413, {"user": "x" * 500_000}), (400, {"temperature": "warm"}),
    (400, {"max_tokens": 10**9}), (400, {"n": 10**6}), (400, {"stop": [["a"]]}),
    (400, {"prompt": [10**9]}), (400, {"logit_bias": {"1": 500}}), (400, {"no": True}), (400, {}),
)  # fmt: skip
"""Statuses of invalid requests, and what makes them invalid."""


class RandomPlans(Policy):
    """Gives blocks and their caches random levels, in a random order, until the request fits."""

    name = "random"

    def __init__(self, memory: MemoryModel, seed: int) -> None:
        self._memory, self._random = memory, random.Random(seed)

    def choose(self, request: Request) -> Plan:
        """Return a random plan; it fits the request unless even all blocks are too few."""
        facts, draw, plan = self._memory.facts, self._random, Plan()
        for index in draw.sample(range(facts.num_blocks), facts.num_blocks):
            if self._memory.peak_bytes(plan, request) <= request.budget_bytes:
                break
            level = draw.choice(["removed", *facts.weight_levels(index)])
            levels = plan.levels | {block_name(index): level}
            if index % 2 == 0 and level != "removed":
                levels[cache_name(index // 2)] = draw.choice(["native", "int8", "int4", "int2"])
            plan = Plan.of(levels)
        return plan


class RecordingEngine(Engine):
    """An engine that samples answers of one plan, and counts plans and passes below the floor."""

    def record(self, sample_share: float) -> None:
        """Begin to record, with a sample of that share of the answers."""
        self._random, self._share = random.Random(0), sample_share
        self.sample: list[RequestHandle] = []
        self.plans: set[int] = set()
        self.unfinished: set[int] = set()
        self.passes_below_floor = 0
        self.last_event_s = time.monotonic()
        self.observers.append(self._check_floor)

    def submit(self, *request: Any, **options: Any) -> RequestHandle:
        """Submit a request as `Engine.submit` does, and follow it."""
        handle = super().submit(*request, **options)
        self.unfinished.add(handle.id)
        handle.add_listener(partial(self._hear, handle))
        return handle

    def _hear(self, handle: RequestHandle, event: Event) -> None:
        self.last_event_s = time.monotonic()
        if isinstance(event, EndEvent):
            self.unfinished.discard(handle.id)
            plans = set(handle.plans)
            self.plans.update(map(hash, plans))
            if len(plans) == 1 and self._random.random() < self._share:
                self.sample.append(handle)

    def _check_floor(self, step: StepRecord) -> None:
        chooser = self.controller.chooser
        if chooser.max_delta_nll is not None:
            rise = chooser.delta_nll(step.plan, step.length)
            self.passes_below_floor += rise is None or rise > chooser.max_delta_nll


def check_answers(
    fresh: ElasticLLM, answers: Sequence[RequestHandle], *, controls: int = 40
) -> dict[str, int]:
    """Compare answers with the same model, loaded again; controls, under plans of another block."""
    counts: Counter[str] = Counter()
    for number, answer in enumerate(answers):
        plan = answer.plans[0]
        wrong = _is_wrong(fresh, answer, plan)
        counts.update(answers=1, tokens=len(answer.token_ids), wrong_answers=wrong)
        if number < controls:
            other = plan.removed ^ {fresh.num_blocks // 2}
            wrong = _is_wrong(fresh, answer, replace(plan, removed=other))
            counts.update(control_answers=1, control_wrong=wrong)
    return dict(counts)


def _is_wrong(fresh: ElasticLLM, answer: RequestHandle, plan: Plan) -> bool:
    """Whether a token of an answer is not the model's under a plan, given the tokens before it."""
    rows, cache = [], None
    with fresh.masked(plan), torch.no_grad():
        for piece in (answer.prompt_ids, *((token,) for token in answer.token_ids[:-1])):
            output = fresh.model(
                input_ids=torch.tensor([piece], device=fresh.device),
                use_cache=True,
                **{cache_argument(fresh.model): cache},
            )
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float().cpu())
    logits = torch.stack(rows)
    tolerance = TIE_ROUNDINGS * torch.finfo(fresh.dtype).eps * logits.abs().amax(dim=-1)
    tolerance = tolerance.clamp(min=MIN_TOLERANCE)
    chosen = torch.tensor(answer.token_ids)[:, None]
    behind = (logits.amax(dim=-1) - logits.gather(1, chosen)[:, 0]) * answer.params.greedy
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
    wrong = ((logprobs - torch.tensor(answer.logprobs)).abs() > tolerance) | (behind > tolerance)
    return bool(wrong.any())


def memory_growth(samples: Sequence[int]) -> float:
    """Relative growth of bytes from the median of the second tenth to that of the last tenth."""
    tenth = max(1, len(samples) // 10)
    early = statistics.median(samples[tenth : 2 * tenth])
    return statistics.median(samples[-tenth:]) / early - 1


class Soak:
    """A server, its clients and its budget."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._soak = config, config.soak
        self._random, self._budget_bytes = random.Random(config.seed), UNLIMITED_BYTES
        settings = server_settings(config, folder)
        llm = load_served_model(settings)
        self._stack = build_stack(
            settings,
            llm=llm,
            policy=RandomPlans(MemoryModel(llm), config.seed) if config.soak.random_plans else None,
            memory=GivenMemory(lambda: self._budget_bytes, limit_bytes=UNLIMITED_BYTES),
            engine_class=RecordingEngine,
            meter=TensorMeter(llm) if config.soak.meter == "tensors" else process_meter(llm),
            hold_s=0.3,
        )
        assert isinstance(self._stack.engine, RecordingEngine)
        self._engine = self._stack.engine
        self._engine.record(min(1.0, config.soak.checks / config.soak.requests))
        special = set(llm.tokenizer.all_special_ids)
        self._token_ids = [n for n in range(llm.adapter.vocab_size) if n not in special]
        self._kinds: Counter[str] = Counter()
        self._problems: list[str] = []
        self._resident: list[int] = []
        self._budget_changes = self._sent = self._in_flight = 0
        self._rest_answers: set[tuple[int, ...]] = set()
        self._gate, self._lock, self._stop = threading.Lock(), threading.Lock(), threading.Event()

    def run(self) -> dict[str, Any]:
        """Serve, send requests, check the answers, and return the record."""
        from rap_env.serving.server import BackgroundServer

        soak, started_s, monitor = self._soak, time.monotonic(), self._engine.controller.monitor
        with BackgroundServer(self._stack.app) as server:
            self._measure_at_rest()
            full_bytes = self._engine.controller.estimator.peak_bytes(
                Plan(), BatchShape(self._stack.settings.max_batch_size, 40)
            )
            # The memory of libraries and clients in this process does not depend on the plan.
            full_bytes += max(0, monitor.used_bytes - monitor.held.total)
            send = partial(self._send_requests, server.url)
            clients = [threading.Thread(target=send, daemon=True) for _ in range(soak.clients)]
            for client in clients:
                client.start()
            while any(client.is_alive() for client in clients) and not self._stop.is_set():
                time.sleep(min(self._random.expovariate(1 / soak.phase_s), 5.0))
                self._budget_changes += 1
                # Now and then no request fits, or everything does.
                share = self._random.choice([0, 1.2, *(self._random.uniform(0.4, 1),) * 6])
                self._budget_bytes = int(share * full_bytes)
                if len(self._resident) <= self._sent * soak.rss_samples // soak.requests:
                    self._measure_at_rest()
                if time.monotonic() - started_s > 60 * soak.max_minutes:
                    self._stop.set()
            self._measure_at_rest()
            seconds, unfinished = time.monotonic() - started_s, len(self._engine.unfinished)
        self._stack.close()
        model = self._config.model
        fresh = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
        agreement, growth = check_answers(fresh, self._engine.sample), memory_growth(self._resident)
        checks = {
            "every_request_ended": unfinished == 0,
            "statuses_and_answers_right": not self._problems,
            "sample_agrees": agreement.get("wrong_answers") == 0,
            "dense_answer_always_the_same": len(self._rest_answers) == 1,
            "no_pass_below_the_floor": self._engine.passes_below_floor == 0,
            "memory_flat": growth <= soak.rss_tolerance,
        }
        return {
            "model": self._engine.llm.name,
            "requests": self._kinds.total(),
            "seconds": round(seconds, 1),
            "kinds": dict(sorted(self._kinds.items())),
            "budget_changes": self._budget_changes,
            "switches": self._engine.controller.switcher.switches,
            "masks": len(self._engine.plans),
            "agreement": agreement,
            "rss_bytes": {"growth": growth, "samples": self._resident},
            "checks": checks,
            "passed": all(checks.values()),
            "problems": self._problems[:50],
            "provenance": provenance({"run": self._config.seed}),
        }

    def _measure_at_rest(self) -> None:
        """Measure resident memory and one answer of the native model, while no client sends."""
        with self._gate:
            budget, self._budget_bytes = self._budget_bytes, UNLIMITED_BYTES
            quiet_s = self._engine.last_event_s = time.monotonic()
            while time.monotonic() - quiet_s < 0.3:  # of disconnected clients, requests still run
                if self._in_flight or self._engine.llm.plan or self._engine.unfinished:
                    quiet_s = time.monotonic()
                if quiet_s - self._engine.last_event_s > self._soak.hang_s:
                    self._problems.append(f"A hang: no token and no end for {self._soak.hang_s} s.")
                    return self._stop.set()
                time.sleep(0.02)
            prompt = self._token_ids[:: max(1, len(self._token_ids) // 12)]
            handle = self._engine.submit(prompt, SamplingParams(max_new_tokens=8))
            self._rest_answers.add(tuple(handle.result(self._soak.hang_s).token_ids))
            with self._engine.llm.exclusive():
                return_freed_memory()
                self._resident.append(resident_bytes()[1])
            self._budget_bytes = budget
        return None

    def _send_requests(self, url: str) -> None:
        """Send one request after another, each of a kind drawn by seed and number."""
        clients = [self._good, self._bad, self._cancel, self._disconnect]
        with httpx.Client(base_url=url, timeout=self._soak.hang_s) as http:
            while not self._stop.is_set():
                with self._gate, self._lock:
                    number = self._sent
                    if number == self._soak.requests:
                        return
                    self._sent, self._in_flight = number + 1, self._in_flight + 1
                draw = random.Random(f"{self._config.seed} {number}")
                (send,) = draw.choices(clients, [70, 15, 8, 7])
                kind = send.__name__.strip("_")
                try:
                    problem = send(http, draw)
                except Exception as error:
                    problem = repr(error)
                with self._lock:
                    self._in_flight -= 1
                    self._kinds[kind] += 1
                    if problem:
                        self._problems.append(f"Request {number} ({kind}): {problem}")

    def _body(self, draw: random.Random) -> dict[str, Any]:
        prompt = draw.choices(self._token_ids, k=draw.randint(1, 24))
        body = {"max_tokens": draw.randint(1, 8), "temperature": draw.choice([0, 0, 0.7, 1.3])}
        return {"model": self._stack.settings.served_name, "prompt": prompt, **body}

    def _good(self, http: httpx.Client, draw: random.Random) -> str:
        body = self._body(draw) | {"n": draw.choice([1, 1, 1, 2]), "stream": draw.random() < 0.5}
        response = http.post("/v1/completions", json=body)
        texts = response.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
        answers = [json.loads(text.removeprefix("data: ")) for text in texts]
        if error := answers[-1].get("error"):
            return "" if error["code"] in REJECTED_CODES else f"{error}"
        reasons = [c["finish_reason"] for answer in answers for c in answer["choices"]]
        ends = [reason for reason in reasons if reason in ("stop", "length")]
        return "" if len(ends) == body["n"] else f"{len(ends)} answers to {body}"

    def _bad(self, http: httpx.Client, draw: random.Random) -> str:
        status, change = draw.choice(_INVALID)
        content = json.dumps(self._body(draw) | change).encode()
        if not change:  # not even JSON
            content = content[: draw.randrange(len(content))] + draw.randbytes(9)
        response = http.post("/v1/completions", content=content)
        right = response.status_code == status and "error" in response.json()
        return "" if right else f"{content[:100]!r} got {response.status_code}, not {status}"

    def _cancel(self, http: httpx.Client, draw: random.Random) -> str:
        body = self._body(draw) | {"stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines(), None)
        return ""

    def _disconnect(self, http: httpx.Client, draw: random.Random) -> str:
        content = json.dumps(self._body(draw)).encode()
        head = f"host: soak\r\ncontent-length: {len(content)}\r\n\r\n"
        message = b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + content
        address = http.base_url.host, http.base_url.port or 80
        with socket.create_connection(address) as connection:
            connection.sendall(message[: draw.choice([draw.randrange(len(message)), None])])
            time.sleep(0.3 * draw.random())
        return ""


def soak(config: Config, folder: Path) -> None:
    """Run the soak test, append its record to a file, and print it; exit with 1 if it failed."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    record = Soak(config, folder).run()
    append_record(Path(config.soak.out) if config.soak.out else folder / "soak.jsonl", record)
    say(json.dumps(record))
    if not record["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    launch("soak", soak)
