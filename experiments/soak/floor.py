"""``python -m experiments.soak.floor``: a server with a floor of quality under budgets that move.

Clients ask a real server for completions while the memory budget jumps between
``soak.floor_budgets``, of which the smallest may hold no plan above the floor. The exit status is 1
if a pass through the model ran with a plan below ``serve.max_delta_nll``, an answer says so of
itself, or a refusal is not a status 503 with its reason and ``Retry-After``.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from experiments.config import Config
from experiments.config.serving import SoakConfig
from experiments.contexts import server_settings
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.soak.recording import plain_token_ids, publish
from experiments.study.run_folder import provenance
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.runtime.memory_source import GivenMemory
from rap_env.runtime.metrics import StepRecord
from rap_env.runtime.plan_chooser import PlanChooser
from rap_env.serving.settings import parse_bytes
from rap_env.serving.stack import ServerStack, build_stack, load_served_model

RECORD_FILE = "floor.jsonl"
REASONS = ("insufficient_quality", "insufficient_memory")
"""Codes of a refusal because of memory: it holds only plans below the floor, or none at all."""


@dataclass
class Passes:
    """What the passes through the model ran with.

    Attributes:
        floor: Largest predicted rise that a plan may have, nats per token.
        number: Passes so far.
        below_floor: Those whose plan has a predicted rise in NLL above `floor`.
        over_budget: Those whose measured peak was above their budget.
        max_delta_nll: Largest predicted rise, nats per token.
        least_budget_bytes: Smallest budget under which one ran.
    """

    chooser: PlanChooser
    floor: float
    number: int = 0
    below_floor: int = 0
    over_budget: int = 0
    max_delta_nll: float = 0.0
    least_budget_bytes: int = 2**62

    def count(self, step: StepRecord) -> None:
        """Count a pass."""
        rise = self.chooser.rise(step.plan, step.length)
        assert rise is not None
        self.number += 1
        self.below_floor += rise > self.floor
        self.over_budget += step.peak_bytes > step.budget_bytes
        self.max_delta_nll = max(self.max_delta_nll, rise)
        self.least_budget_bytes = min(self.least_budget_bytes, step.budget_bytes)


@dataclass
class Responses:
    """What clients got.

    Attributes:
        outcomes: Numbers of answers, and of refusals by their code.
        max_delta_nll: Largest rise that an answer says of itself, nats per token.
        problems: Responses that must not be, such as a refusal without a reason.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    max_delta_nll: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, response: httpx.Response) -> None:
        """Add a response."""
        body = response.json()
        if response.status_code == 200:
            self.outcomes["answered"] += 1
            self.max_delta_nll = max(self.max_delta_nll, body["rap"]["delta_nll"])
            return
        error = body["error"]
        self.outcomes[error["code"]] += 1
        full = response.status_code == 429
        if not full and (response.status_code != 503 or error["code"] not in REASONS):
            self.problems.append(f"{response.status_code} {error['code']}: {error['message']}")
        if "retry-after" not in response.headers:
            self.problems.append(f"{response.status_code} without Retry-After")


def floor(config: Config, folder: Path) -> None:
    """Serve, write the record and print its summary.

    Raises:
        RapError: The model cannot be loaded.
        ExperimentError: The server has no floor of quality.
        SystemExit: A check failed.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    settings = server_settings(config, folder)
    llm, budgets = load_served_model(settings), [budget_range(config.soak)[1]]
    memory = GivenMemory(lambda: budgets[-1], limit_bytes=budgets[0])
    stack = build_stack(settings, llm=llm, memory=memory, meter=TensorMeter(llm))
    limit = stack.engine.controller.chooser.max_delta_nll
    if limit is None:
        raise ExperimentError("The server has no floor of quality; set serve.max_delta_nll.")
    record = serve_above_floor(stack, limit, budgets, config.soak, config.seed)
    path = Path(config.soak.out) if config.soak.out else folder / RECORD_FILE
    publish(path, {**record, "provenance": provenance({"run": config.seed})}, summary(record))
    if not record["passed"]:
        sys.exit(1)


def budget_range(soak: SoakConfig) -> tuple[int, int]:
    """The smallest and the largest budget, bytes."""
    least, most = (parse_bytes("soak.floor_budgets", text) for text in soak.floor_budgets)
    return least, most


def serve_above_floor(
    stack: ServerStack, limit: float, budgets: list[int], soak: SoakConfig, seed: int
) -> dict[str, Any]:
    """Serve ``soak.requests`` requests under moving budgets, and count what they got.

    Args:
        stack: A server with a floor of quality, whose budget is the last of `budgets`; it is
            closed at the end.
        limit: The floor, nats per token.
        budgets: Bytes; each new budget is appended.
        soak: Numbers of requests and clients, lengths, times and budgets.
        seed: Seed of the prompts and budgets.
    """
    from rap_env.serving.server import BackgroundServer

    (least, most), draw = budget_range(soak), random.Random(seed)
    passes = Passes(stack.engine.controller.chooser, limit)
    responses, started_s = Responses(), time.monotonic()
    stack.engine.observers.append(passes.count)
    stopped = threading.Event()
    left = iter(range(soak.requests))
    token_ids = plain_token_ids(stack.engine.llm)

    def send(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        with httpx.Client(timeout=soak.hang_s) as http:
            while not stopped.is_set() and next(left, None) is not None:
                prompt = chance.choices(token_ids, k=chance.randint(1, soak.prompt_tokens))
                body = {"model": stack.settings.served_name, "prompt": prompt, "temperature": 0,
                        "max_tokens": chance.randint(1, soak.answer_tokens)}  # fmt: skip
                try:
                    responses.add(http.post(f"{server.url}/v1/completions", json=body))
                except httpx.HTTPError as error:
                    responses.problems.append(f"no response: {error!r}")

    with BackgroundServer(stack.app) as server:
        clients = [threading.Thread(target=send, args=(n,)) for n in range(soak.clients)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            time.sleep(min(draw.expovariate(1 / soak.phase_s), 5 * soak.phase_s))
            budgets.append(draw.randint(least, most))
            if time.monotonic() - started_s > 60 * soak.max_minutes:
                stopped.set()
        for client in clients:
            client.join()
    stack.close()
    checks = {
        "no_pass_below_the_floor": passes.below_floor == 0 < passes.number,
        "no_answer_below_the_floor": responses.max_delta_nll <= limit + 1e-9,
        "every_refusal_says_why": not responses.problems,
    }
    return {
        "model": stack.engine.llm.name,
        "max_delta_nll": limit,
        "budgets_bytes": [least, most],
        "budget_changes": len(budgets) - 1,
        "seconds": round(time.monotonic() - started_s, 1),
        "requests": responses.outcomes.total(),
        "outcomes": dict(sorted(responses.outcomes.items())),
        "passes": passes.number,
        "passes_below_floor": passes.below_floor,
        "passes_over_budget": passes.over_budget,
        "least_budget_bytes_of_a_pass": passes.least_budget_bytes,
        "max_delta_nll_of_a_pass": passes.max_delta_nll,
        "max_delta_nll_of_an_answer": responses.max_delta_nll,
        "problems": responses.problems,
        "checks": checks,
        "passed": all(checks.values()),
    }


def summary(record: dict[str, Any]) -> str:
    """Summarize a record in a few lines of text."""
    outcomes = ", ".join(f"{number} {name}" for name, number in record["outcomes"].items())
    least, most = (round(size / 2**20) for size in record["budgets_bytes"])
    lines = [
        f"{record['requests']} requests under {record['budget_changes']} budgets from {least} to "
        f"{most} MiB ({outcomes});",
        f"{record['passes_below_floor']} of {record['passes']} passes ran with a plan below the "
        f"floor of {record['max_delta_nll']} nats per token; the worst had "
        f"{record['max_delta_nll_of_a_pass']:.4f}, the smallest budget of one was "
        f"{record['least_budget_bytes_of_a_pass'] / 2**20:.0f} MiB,",
        f"and {record['passes_over_budget']} were above their budget.",
    ]
    lines += [f"  problem: {problem}" for problem in record["problems"][:10]]
    failed = [name for name, good in record["checks"].items() if not good]
    return "\n".join([*lines, "FAILED: " + ", ".join(failed) if failed else "All checks passed."])


if __name__ == "__main__":
    launch("soak", floor)
