"""First tokens of conversations and of users of one system prompt, with and without keeping.

``python -m benchmarks.conversations``. Both sides are engines on one model in one process, in
turn: each runs the same requests, of tokens that it has not seen before. Times are those of
the CPU, of one thread.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Settings, ratios, spread, target, write_record
from experiments.study.console import run_with_settings

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.engine import Engine

TURNS, FIRST_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 8, 200, 20, 4
"""Turns of a conversation, tokens of its first prompt, and of each message and answer after."""
_READ_USERS = 2
"""Users whose whole prompts are read; without keeping all of them take the same time."""
_TURN_AT_MOST, _USER_AT_MOST = 0.2, 0.15


@dataclass
class ConversationSettings(Settings):
    """Settings of this benchmark; its device is the CPU."""

    model: str = "smollm2-135m@pypi"
    users: int = 20
    """Users of one system prompt, one after another."""
    system_tokens: int = 1000
    """Its tokens."""


def engine_on(llm: ElasticLLM, *, keep: bool) -> Engine:
    """An engine with room for everything, whose clock counts CPU seconds."""
    from rap_env.policies.loading import load_policy
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_meter import TensorMeter

    controller = RuntimeController(llm, load_policy("dense"), 2**32, meter=TensorMeter(llm))
    return Engine(llm, controller, keep=keep, clock=time.process_time)


def answered(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
    """CPU seconds to the first token of an answer, and its tokens."""
    from rap_env.runtime.sampling import SamplingParams

    handle = engine.submit(prompt, SamplingParams(max_new_tokens=ANSWER_TOKENS))
    while not handle.done:
        engine.step()
    return (handle.first_token_s or math.inf) - handle.arrived_s, handle.token_ids


def conversation(engine: Engine, seed: int) -> list[float]:
    """Seconds to the first token of each turn from the second one on."""
    draw = np.random.default_rng([seed, 0])
    history, seconds = _tokens(engine, draw, FIRST_TOKENS), []
    for _ in range(TURNS):
        first_s, answer = answered(engine, history)
        seconds.append(first_s)
        history = [*history, *answer, *_tokens(engine, draw, NEW_TOKENS)]
    return seconds[1:]


def shared_prompt(engine: Engine, seed: int, users: int, system_tokens: int) -> list[float]:
    """Seconds to the first token of each user of a system prompt but the first one."""
    draw = np.random.default_rng([seed, 1])
    system = _tokens(engine, draw, system_tokens)
    prompts = [[*system, *_tokens(engine, draw, NEW_TOKENS)] for _ in range(users)]
    return [answered(engine, prompt)[0] for prompt in prompts][1:]


def _tokens(engine: Engine, draw: np.random.Generator, count: int) -> list[int]:
    drawn: list[int] = draw.integers(3, engine.vocab_size, count).tolist()
    return drawn


def main(settings: ConversationSettings) -> None:
    """Measure, and write the record."""
    from rap_env.models.device import free_memory_early, use_threads
    from rap_env.serving.served_model import load_served_model
    from rap_env.serving.settings import ServerSettings

    use_threads(settings.threads or 1)
    llm = load_served_model(ServerSettings(model=settings.model, device="cpu"))
    free_memory_early()
    engines = {side: engine_on(llm, keep=side == "on") for side in ("off", "on")}
    turns: dict[str, list[float]] = {side: [] for side in engines}
    users: dict[str, list[float]] = {side: [] for side in engines}
    for repeat in range(settings.repeats):
        for side, engine in engines.items():
            turns[side].append(float(np.mean(conversation(engine, repeat))))
            count = settings.users if side == "on" else min(_READ_USERS, settings.users)
            shared = shared_prompt(engine, repeat, count, settings.system_tokens)
            users[side].append(float(np.mean(shared)))
    stats = engines["on"].stats()
    against = "the same engine without keeping, one thread"
    targets = [
        target(
            f"first token of turns 2 to {TURNS} of a conversation",
            *ratios(turns["on"], turns["off"]),
            at_most=_TURN_AT_MOST,
            against=against,
        ),
        target(
            f"first token of users 2 to {settings.users} of one system prompt of "
            f"{settings.system_tokens} tokens",
            *ratios(users["on"], users["off"]),
            at_most=_USER_AT_MOST,
            against=against,
        ),
    ]
    write_record(
        "conversations",
        settings,
        targets,
        turns_first_token_s={side: spread(seconds) for side, seconds in turns.items()},
        users_first_token_s={side: spread(seconds) for side, seconds in users.items()},
        kept_tokens=stats.kept_tokens,
        kept_bytes=stats.kept_bytes,
        kept_sequences=stats.kept_sequences,
    )
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    run_with_settings(ConversationSettings, main)
