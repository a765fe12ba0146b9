"""A soak test of a server: clients of all kinds, while the budget and the plans change.

Clients send valid and invalid requests, cancel and disconnect. A sample of the answers is
recomputed with a fresh model. ``make soak`` runs it long enough to see whether memory grows.
"""

import itertools
import json
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import httpx
import pytest
import torch

from rap_env.memory import MemoryModel
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.device import resident_bytes, return_freed_memory
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan, block_name, cache_name
from rap_env.policies.base import Policy
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_limit import GivenMemory
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.runtime.request_handle import EndEvent, TokenEvent
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving import stack
from rap_env.serving.served_model import load_served_model
from rap_env.serving.settings import ServerSettings
from tests.serving.background import BackgroundServer
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_model

REQUESTS = int(os.environ.get("RAP_SOAK_REQUESTS", "150"))
MODEL = os.environ.get("RAP_SOAK_MODEL")  # or else a tiny one
DTYPE, PHASE_S = ("float32", 0.1) if MODEL is None else ("auto", 2.0)
CLIENTS, HANG_S, REST_TOKENS = 4, 60.0, 200
CHECKS, RSS_SAMPLES = 400, min(60, REQUESTS // 10)
UNLIMITED_BYTES = 2**50
TIE_ROUNDINGS, MIN_TOLERANCE = 4.0, 1e-3
"""Logits are equal within so many roundings of the largest one: batches sum in another order."""
REJECTED_CODES = ("insufficient_memory", "insufficient_quality", "rate_limit_exceeded")
"""Codes of valid answers when memory is short."""
INVALID = (
    (404, {"model": "another"}),
    (413, {"user": "x" * 500_000}),
    (400, {"temperature": "warm"}),
    (400, {"n": 10**6}),
    (400, {"stop": [["a"]]}),
    (400, {"prompt": [10**9]}),
    (400, {"no": True}),
    (400, {}),
)
"""Statuses of invalid requests, and what makes them invalid; no change: cut, so not even JSON."""


class RandomPlans(Policy):
    """Gives blocks and their caches random levels, in a random order, until the request fits."""

    name = "random"

    def __init__(self, memory):
        self._memory, self._random = memory, random.Random(0)

    def choose(self, request):
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

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sample, self.plans, self.unfinished, self.passes_below_floor = [], set(), [], 0
        self.last_event_s = time.monotonic()
        self.observers.append(self._check_floor)
        self._random = random.Random(0)

    def submit(self, prompt, params, listener=None, **options):
        """Submit a request as `Engine.submit` does, and follow it."""
        answer = SimpleNamespace(prompt_ids=prompt, params=params, tokens=[])
        self.unfinished.append(answer)
        try:
            return super().submit(prompt, params, partial(self._hear, answer, listener), **options)
        except Exception:
            self.unfinished.remove(answer)
            raise

    def _hear(self, answer, listener, event):
        self.last_event_s = time.monotonic()
        if isinstance(event, TokenEvent):
            answer.tokens.append(event)
        elif isinstance(event, EndEvent):
            self.unfinished.remove(answer)
            plans = {token.plan for token in answer.tokens}
            self.plans.update(plans)
            if len(plans) == 1 and self._random.random() < CHECKS / REQUESTS:
                self.sample.append(answer)
        if listener is not None:
            listener(event)

    def _check_floor(self, step):
        chooser = self.controller.chooser
        if chooser.max_delta_nll is not None:
            rise = chooser.delta_nll(step.plan, step.length)
            self.passes_below_floor += rise is None or rise > chooser.max_delta_nll


def is_wrong(fresh, answer, plan):
    """Whether a token of an answer is not a fresh model's under a plan, given those before it."""
    token_ids, rows, cache = [token.token_id for token in answer.tokens], [], None
    with fresh.applied(plan), torch.no_grad():
        for piece in ([*answer.prompt_ids], *([token] for token in token_ids[:-1])):
            given = {"use_cache": True, cache_argument(fresh.model): cache}
            output = fresh.model(input_ids=torch.tensor([piece]), **given)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float())
    logits, chosen = torch.stack(rows), torch.tensor(token_ids)[:, None]
    tolerance = TIE_ROUNDINGS * torch.finfo(fresh.dtype).eps * logits.abs().amax(dim=-1)
    behind = (logits.amax(dim=-1) - logits.gather(1, chosen)[:, 0]) * answer.params.greedy
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
    apart = (logprobs - torch.tensor([token.logprob for token in answer.tokens])).abs()
    return bool((torch.maximum(apart, behind) > tolerance.clamp(min=MIN_TOLERANCE)).any())


class Soak:
    """A server, its clients and its budget."""

    def __init__(self, folder, random_plans):
        self._random, self._budget_bytes = random.Random(0), UNLIMITED_BYTES
        settings = ServerSettings(
            model=MODEL or str(folder),
            dtype=DTYPE,
            max_batch_size=4,
            max_queue=32,
            queue_timeout_s=20,
            strict=True,
        )
        llm = load_served_model(settings)
        with patch.object(stack, "Engine", RecordingEngine):
            self._stack = stack.build_stack(
                settings,
                llm=llm,
                policy=RandomPlans(MemoryModel(llm)) if random_plans else None,
                memory=GivenMemory(lambda: self._budget_bytes, limit_bytes=UNLIMITED_BYTES),
                meter=TensorMeter(llm),
            )
        self.engine = self._stack.engine
        self.engine.controller.headroom.hold_s = 0.3
        special = set(llm.tokenizer.all_special_ids)
        self._token_ids = [n for n in range(llm.adapter.vocab_size) if n not in special]
        self._model = settings.served_name
        self.kinds, self.problems, self.resident, self.rest_answers = Counter(), [], [], set()
        self._sent = self._in_flight = 0
        self._gate, self._lock, self._stop = threading.Lock(), threading.Lock(), threading.Event()

    def run(self):
        """Serve and send the requests while the budget moves."""
        with BackgroundServer(self._stack.app) as server:
            estimator = self.engine.controller.estimator
            native_bytes = estimator.peak_bytes(Plan(), BatchShape(1, 32))
            send = partial(self._send_requests, server.url)
            clients = [threading.Thread(target=send, daemon=True) for _ in range(CLIENTS)]
            for client in clients:
                client.start()
            while any(client.is_alive() for client in clients) and not self._stop.is_set():
                if len(self.resident) <= self._sent * RSS_SAMPLES // REQUESTS:
                    self._measure_at_rest()
                # Now and then no request fits, or everything does.
                share = self._random.choice([0, 3, *(self._random.uniform(0.5, 1),) * 6])
                self._budget_bytes = int(share * native_bytes)
                time.sleep(min(self._random.expovariate(1 / PHASE_S), 5.0))
            self._measure_at_rest()

    def _measure_at_rest(self):
        """Measure resident memory and one answer of the native model, while no client sends."""
        with self._gate:
            self._budget_bytes = UNLIMITED_BYTES
            quiet_s = self.engine.last_event_s = time.monotonic()
            while time.monotonic() - quiet_s < 0.3:  # of disconnected clients, requests still run
                if self._in_flight or self.engine.llm.plan or self.engine.unfinished:
                    quiet_s = time.monotonic()
                if quiet_s - self.engine.last_event_s > HANG_S:
                    self.problems.append(f"A hang: no token and no end for {HANG_S} s.")
                    self._stop.set()
                    return
                time.sleep(0.02)
            prompt = self._token_ids[::5][:REST_TOKENS]
            handle = self.engine.submit(prompt, SamplingParams(max_new_tokens=8))
            self.rest_answers.add(tuple(handle.result(HANG_S).token_ids))
            with self.engine.llm.exclusive():
                return_freed_memory()
                self.resident.append(resident_bytes()[1])

    def _send_requests(self, url):
        """Send one request after another, each of a kind drawn by its number."""
        clients = [self._good, self._bad, self._cancel, self._disconnect]
        with httpx.Client(base_url=url, timeout=HANG_S) as http:
            while not self._stop.is_set():
                with self._gate, self._lock:
                    number = self._sent
                    if number == REQUESTS:
                        return
                    self._sent, self._in_flight = number + 1, self._in_flight + 1
                draw = random.Random(number)
                (send,) = draw.choices(clients, [70, 15, 8, 7])
                try:
                    problem = send(http, draw)
                except Exception as error:
                    problem = repr(error)
                with self._lock:
                    self._in_flight -= 1
                    self.kinds[send.__name__] += 1
                    if problem:
                        self.problems.append(f"Request {number} ({send.__name__}): {problem}")

    def _body(self, draw):
        prompt = draw.choices(self._token_ids, k=draw.randint(1, 24))
        body = {"max_tokens": draw.randint(1, 8), "temperature": draw.choice([0, 0, 0.7, 1.3])}
        return {"model": self._model, "prompt": prompt, **body}

    def _good(self, http, draw):
        body = self._body(draw) | {"n": draw.choice([1, 1, 1, 2]), "stream": draw.random() < 0.5}
        response = http.post("/v1/completions", json=body)
        texts = response.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
        answers = [json.loads(text.removeprefix("data: ")) for text in texts]
        if error := answers[-1].get("error"):
            return "" if error["code"] in REJECTED_CODES else f"{error}"
        reasons = [c["finish_reason"] for answer in answers for c in answer["choices"]]
        ends = [reason for reason in reasons if reason in ("stop", "length")]
        return "" if len(ends) == body["n"] else f"{len(ends)} answers to {body}"

    def _bad(self, http, draw):
        status, change = draw.choice(INVALID)
        content = json.dumps(self._body(draw) | change).encode()
        if not change:
            content = content[: draw.randrange(len(content))] + draw.randbytes(9)
        response = http.post("/v1/completions", content=content)
        right = response.status_code == status and "error" in response.json()
        return "" if right else f"{content[:100]!r} got {response.status_code}, not {status}"

    def _cancel(self, http, draw):
        body = self._body(draw) | {"stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines(), None)

    def _disconnect(self, http, draw):
        content = json.dumps(self._body(draw)).encode()
        head = f"host: soak\r\ncontent-length: {len(content)}\r\n\r\n"
        message = b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + content
        with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
            connection.sendall(message[: draw.choice([draw.randrange(len(message)), None])])
            time.sleep(0.3 * draw.random())


@pytest.mark.slow
@pytest.mark.parametrize("random_plans", [True, False])
def test_a_server_under_load_and_a_moving_budget(tmp_path, random_plans):
    tiny_model(layers=4).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    soak = Soak(tmp_path, random_plans)
    soak.run()
    engine = soak.engine
    assert not soak.problems
    assert not engine.unfinished
    assert soak.kinds.total() == REQUESTS
    assert len(soak.rest_answers) == 1, "the native plan's answer is always the same"
    assert engine.passes_below_floor == 0
    tenth = max(1, len(soak.resident) // 10)
    early, late = soak.resident[tenth : 2 * tenth], soak.resident[-tenth:]
    growth = statistics.median(late) / statistics.median(early) - 1
    assert growth < (0.02 if REQUESTS >= 2000 else 1.0)
    fresh = load_llm(MODEL or str(tmp_path), dtype=DTYPE, weights="native")
    assert len(engine.sample) > 10
    for answer in engine.sample:
        assert not is_wrong(fresh, answer, answer.tokens[0].plan)
    plans = [answer.tokens[0].plan for answer in engine.sample[:20]]
    others = [replace(plan, removed=plan.removed ^ {4}) for plan in plans]
    assert any(map(is_wrong, itertools.repeat(fresh), engine.sample, others)), "the check sees all"
    assert len(engine.plans) > 2
    assert engine.controller.switcher.switches > 5
