"""First tokens and tokens a second of conversations, with and without keeping.

``python -m benchmarks.conversations``. Both sides are engines on one model in one process, in
turn: each runs the same requests, of tokens that it has not seen before. Times are those of
the CPU, of one thread.

``python -m benchmarks.conversations llama_server=PATH`` compares `rap serve` with llama.cpp's
server and the same file instead: first tokens of chats, whose prompts both keep, in turn. Times
are those of a clock, so nothing else should run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Settings, ratios, spread, target, write_record
from experiments.study.console import run_with_settings
from experiments.study.servers import Server, llama_command, piece, rap_command

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.engine import Engine

TURNS, FIRST_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 8, 200, 20, 4
"""Turns of a conversation, tokens of its first prompt, and of each message and answer after."""
SPEED_USERS, SPEED_TURNS, SPEED_NEW_TOKENS, SPEED_ANSWER_TOKENS = 4, 4, 112, 16
"""Those of conversations at one time, of which the tokens a second are measured."""
_FIRST_CHARACTERS, _NEW_CHARACTERS = 800, 80
"""About those tokens, of chats."""
_READ_USERS = 2
"""Users whose whole prompts are read; without keeping all of them take the same time."""
_TURN_AT_MOST, _USER_AT_MOST, _SPEED_AT_LEAST, _LLAMA_AT_MOST = 0.2, 0.15, 1.8, 0.9


@dataclass
class ConversationSettings(Settings):
    """Settings of this benchmark; its device is the CPU."""

    model: str = "smollm2-135m@pypi"
    users: int = 20
    """Users of one system prompt, one after another."""
    system_tokens: int = 1000
    """Its tokens."""
    llama_server: str | None = None
    """llama.cpp's program; null to compare engines."""


def engine_on(llm: ElasticLLM, *, keep: bool) -> Engine:
    """An engine with room for everything, whose clock counts CPU seconds."""
    from rap_env.policies.loading import load_policy
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_meter import TensorMeter

    controller = RuntimeController(llm, load_policy("dense"), 2**32, meter=TensorMeter(llm))
    return Engine(llm, controller, keep=keep, clock=time.process_time)


def talk(
    engine: Engine,
    history: list[int],
    messages: Sequence[list[int]],
    answer: int,
    first_s: list[float],
) -> Iterator[bool]:
    """Hold a conversation, each message right after the answer to the one before it.

    Args:
        engine: The engine, which runs a turn between two items.
        history: The first prompt.
        messages: The messages after the answers to it.
        answer: Tokens of an answer.
        first_s: Where seconds to the first token of each answer are added.
    """
    from rap_env.runtime.sampling import SamplingParams

    for message in (*messages, []):
        handle = engine.submit(history, SamplingParams(max_new_tokens=answer))
        while not handle.done:
            yield True
        first_s.append((handle.first_token_s or math.inf) - handle.arrived_s)
        history = [*history, *handle.token_ids, *message]


def run(engine: Engine, talks: list[Iterator[bool]]) -> None:
    """Hold conversations at one time, to their ends."""
    while talks := [each for each in talks if next(each, False)]:
        engine.step()


def conversation(engine: Engine, seed: int) -> list[float]:
    """Seconds to the first token of each turn from the second one on."""
    draw, seconds = np.random.default_rng([seed, 0]), list[float]()
    first = _tokens(engine, draw, FIRST_TOKENS)
    messages = [_tokens(engine, draw, NEW_TOKENS) for _ in range(TURNS - 1)]
    run(engine, [talk(engine, first, messages, ANSWER_TOKENS, seconds)])
    return seconds[1:]


def shared_prompt(engine: Engine, seed: int, users: int, system_tokens: int) -> list[float]:
    """Seconds to the first token of each user of a system prompt but the first one."""
    draw, seconds = np.random.default_rng([seed, 1]), list[float]()
    system = _tokens(engine, draw, system_tokens)
    for _ in range(users):
        prompt = [*system, *_tokens(engine, draw, NEW_TOKENS)]
        run(engine, [talk(engine, prompt, [], ANSWER_TOKENS, seconds)])
    return seconds[1:]


def speed(engine: Engine, seed: int) -> float:
    """Answer tokens a second of some users who talk at one time, after one system prompt."""
    draw = np.random.default_rng([seed, 2])
    system, talks = _tokens(engine, draw, SPEED_NEW_TOKENS), []
    for _ in range(SPEED_USERS):
        first, *messages = (_tokens(engine, draw, SPEED_NEW_TOKENS) for _ in range(SPEED_TURNS))
        talks.append(talk(engine, system + first, messages, SPEED_ANSWER_TOKENS, []))
    began_s = engine.clock()
    run(engine, talks)
    return SPEED_USERS * SPEED_TURNS * SPEED_ANSWER_TOKENS / (engine.clock() - began_s)


def chat(server: Server, model: str, seed: int) -> list[float]:
    """Seconds to the first text of each turn of a chat from the second one on."""
    draw, messages, seconds = np.random.default_rng(seed), list[dict[str, str]](), []
    texts = sorted(topics.values(), key=len)[-40:]
    for turn in range(TURNS):
        text = texts[draw.integers(len(texts))]
        begin = int(draw.integers(len(text) // 2))
        text = text[begin : begin + (_NEW_CHARACTERS if turn else _FIRST_CHARACTERS)]
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        began_s, first_s, answer = time.perf_counter(), math.inf, ""
        for event in server.chat(body):
            if answer := answer + piece(event):
                first_s = min(first_s, time.perf_counter() - began_s)
        messages.append({"role": "assistant", "content": answer})
        seconds.append(first_s)
    return seconds[1:]


def _tokens(engine: Engine, draw: np.random.Generator, count: int) -> list[int]:
    drawn: list[int] = draw.integers(3, engine.vocab_size, count).tolist()
    return drawn


def main(settings: ConversationSettings) -> None:
    """Measure, and write the record."""
    if settings.llama_server is not None:
        compare_servers(settings, settings.llama_server)
        return
    from rap_env.models.device import free_memory_early, use_threads
    from rap_env.serving.served_model import load_served_model
    from rap_env.serving.settings import ServerSettings

    use_threads(settings.threads or 1)
    llm = load_served_model(ServerSettings(model=settings.model, device="cpu"))
    free_memory_early()
    engines = {side: engine_on(llm, keep=side == "on") for side in ("off", "on")}
    turns: dict[str, list[float]] = {side: [] for side in engines}
    users: dict[str, list[float]] = {side: [] for side in engines}
    tokens_per_s: dict[str, list[float]] = {side: [] for side in engines}
    for repeat in range(settings.repeats):
        for side, engine in engines.items():
            turns[side].append(float(np.mean(conversation(engine, repeat))))
            count = settings.users if side == "on" else min(_READ_USERS, settings.users)
            shared = shared_prompt(engine, repeat, count, settings.system_tokens)
            users[side].append(float(np.mean(shared)))
            tokens_per_s[side].append(speed(engine, repeat))
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
        target(
            f"tokens a second of {SPEED_USERS} users, each with {SPEED_TURNS} turns",
            *ratios(tokens_per_s["on"], tokens_per_s["off"]),
            at_least=_SPEED_AT_LEAST,
            against=against,
        ),
    ]
    write_record(
        "conversations",
        settings,
        targets,
        turns_first_token_s={side: spread(seconds) for side, seconds in turns.items()},
        users_first_token_s={side: spread(seconds) for side, seconds in users.items()},
        tokens_per_s={side: spread(each) for side, each in tokens_per_s.items()},
        kept_tokens=stats.kept_tokens,
        kept_bytes=stats.kept_bytes,
        kept_sequences=stats.kept_sequences,
    )
    for engine in engines.values():
        engine.close()


def compare_servers(settings: ConversationSettings, llama_server: str) -> None:
    """Compare `rap serve` with llama.cpp's server, which keeps its prompts by default."""
    commands = {
        "rap": rap_command(settings.model),
        "llama.cpp": llama_command(llama_server, settings.model, "-np", "1", "-c", "4096"),
    }
    seconds: dict[str, list[float]] = {side: [] for side in commands}
    with ExitStack() as stack:
        servers = {side: Server(command) for side, command in commands.items()}
        for server in servers.values():
            stack.callback(server.close)
        for server in servers.values():
            server.wait_until_ready()
            chat(server, settings.model, settings.repeats)
        for repeat in range(settings.repeats):
            for side, server in servers.items():
                seconds[side].append(float(np.mean(chat(server, settings.model, repeat))))
    reached = target(
        f"first token of turns 2 to {TURNS} of a chat",
        *ratios(seconds["rap"], seconds["llama.cpp"]),
        at_most=_LLAMA_AT_MOST,
        against="llama.cpp's server, the same file, prompts kept, one thread",
    )
    times = {side: spread(each) for side, each in seconds.items()}
    settings.llama_server = Path(llama_server).name
    write_record("conversations_llama_cpp", settings, [reached], first_token_s=times)


if __name__ == "__main__":
    run_with_settings(ConversationSettings, main)
