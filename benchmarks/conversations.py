"""First tokens and tokens a second of conversations, with and without keeping.

``python -m benchmarks.conversations``. Both sides are engines on one model in one process, in
turn: each runs the same requests, of tokens that it has not seen before. Times are those of
the CPU, of one thread. At the end the limit falls, and what is kept is given back. `rap serve`
is then started to measure its memory, and how much of their history later turns of a chat
read again.

``python -m benchmarks.conversations llama_server=PATH`` compares `rap serve` with llama.cpp's
server and the same file instead: first tokens of chats, whose prompts both keep, in turn. Times
are those of a clock, so nothing else should run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measuring import Settings, ratios, spread, target, write_record
from experiments.study.console import run_with_settings
from experiments.study.servers import Server, llama_command, piece, rap_command

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.engine import Engine

TURNS, FIRST_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 8, 200, 20, 4
"""Turns of a conversation, tokens of its first prompt, and of each message and answer after."""
SPEED_USERS, SPEED_TURNS, SPEED_NEW_TOKENS, SPEED_ANSWER_TOKENS = 4, 4, 112, 16
"""Those of conversations at one time, of which the tokens a second are measured."""
_FIRST_CHARACTERS, _NEW_CHARACTERS, _CHAT_ANSWER_TOKENS = 800, 80, 32
"""Characters of a chat's first message and of later ones, about those tokens; tokens of an answer
where what is read again is counted."""
_READ_USERS = 2
"""Users whose whole prompts are read; without keeping all of them take the same time."""
_BOUNDS: dict[str, tuple[str, dict[str, float]]] = {
    "turns_first_token_s": (
        f"first token of turns 2 to {TURNS} of a conversation",
        {"at_most": 0.2},
    ),
    "users_first_token_s": (
        "first token of users 2 to {users} of one system prompt of {system_tokens} tokens",
        {"at_most": 0.15},
    ),
    "tokens_per_s": (
        f"tokens a second of {SPEED_USERS} users, each with {SPEED_TURNS} turns",
        {"at_least": 1.8},
    ),
}
"""What is measured with and without keeping, and the bound of the ratio."""
_LLAMA_AT_MOST = 0.9
_FALL_BYTES, _FALL_STEPS = 200 * 2**20, 16
"""By how much the limit falls, and decode steps before that, of which one's time is the median."""
_FALL_AT_MOST_S, _IDLE_AT_MOST_MIB = 0.3, 354


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


def engine_on(llm: ElasticLLM, limit_bytes: list[int], *, keep: bool) -> Engine:
    """An engine within the last one of some limits, whose clock counts CPU seconds."""
    from rap_env.policies.loading import load_policy
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_monitor import TensorMeter
    from rap_env.runtime.records import EngineSettings

    policy, limit, meter = load_policy("dense"), lambda: limit_bytes[-1], TensorMeter(llm)
    controller = RuntimeController(llm, policy, limit, meter=meter, clock=time.process_time)
    return Engine(controller, EngineSettings(keep=keep))


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


def conversation(engine: Engine, seed: int) -> float:
    """Mean seconds to the first token of the turns from the second one on."""
    draw, seconds = np.random.default_rng([seed, 0]), list[float]()
    first = _tokens(engine, draw, FIRST_TOKENS)
    messages = [_tokens(engine, draw, NEW_TOKENS) for _ in range(TURNS - 1)]
    run(engine, [talk(engine, first, messages, ANSWER_TOKENS, seconds)])
    return float(np.mean(seconds[1:]))


def shared_prompt(engine: Engine, seed: int, users: int, system_tokens: int) -> float:
    """Mean seconds to the first token of the users of a system prompt but the first one."""
    draw, seconds = np.random.default_rng([seed, 1]), list[float]()
    system = _tokens(engine, draw, system_tokens)
    for _ in range(users):
        prompt = [*system, *_tokens(engine, draw, NEW_TOKENS)]
        run(engine, [talk(engine, prompt, [], ANSWER_TOKENS, seconds)])
    return float(np.mean(seconds[1:]))


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


def give_back(engine: Engine, limit_bytes: list[int], bytes_given: int) -> tuple[float, float]:
    """Let the limit fall before a decode step, so that bytes that are kept must be given back.

    Returns:
        CPU seconds until resident memory has fallen by them, at the end of a decode step, and by
        how many decode steps that one took longer than others.
    """
    from rap_env.models.device import resident_bytes
    from rap_env.runtime.memory_estimator import BatchShape, PassSize
    from rap_env.runtime.sampling import SamplingParams

    steps_s, clock = list[float](), engine.clock
    prompt = _tokens(engine, np.random.default_rng(3), FIRST_TOKENS)
    handle = engine.submit(prompt, SamplingParams(max_new_tokens=4 * _FALL_STEPS))
    for _ in range(_FALL_STEPS):
        began_s = clock()
        engine.step()
        steps_s.append(clock() - began_s)
    decode_step = PassSize(1, prefills=False)
    room_bytes = engine.controller.monitor.room_for_kept(
        BatchShape(1, handle.final_tokens), decode_step
    )
    excess_bytes = engine.stats().kept_bytes - bytes_given - room_bytes
    before, began_s = resident_bytes()[1], clock()
    limit_bytes.append(limit_bytes[-1] + excess_bytes)
    while resident_bytes()[1] > before - bytes_given and not handle.done:
        engine.step()
    seconds = clock() - began_s
    handle.cancel()
    engine.step()
    return seconds, float(seconds / np.median(steps_s) - 1)


def chat(
    server: Server, model: str, seed: int, answer_tokens: int
) -> tuple[list[float], list[int]]:
    """What later turns of a chat take.

    Returns:
        Seconds to the first text of each turn from the second one on, and how many tokens of
        the prompt and the answer before it read again: one, which no pass has run, after an
        answer of full length.
    """
    draw, messages, seconds = np.random.default_rng(seed), list[dict[str, str]](), []
    history, read_again = 0, list[int]()
    texts = sorted(topics.values(), key=len)[-40:]
    for turn in range(TURNS):
        text = texts[draw.integers(len(texts))]
        begin = int(draw.integers(len(text) // 2))
        text = text[begin : begin + (_NEW_CHARACTERS if turn else _FIRST_CHARACTERS)]
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "max_tokens": answer_tokens, "temperature": 0}
        began_s, first_s, answer = time.perf_counter(), math.inf, ""
        for event in server.chat(body):
            if answer := answer + piece(event):
                first_s = min(first_s, time.perf_counter() - began_s)
            if usage := event.get("usage"):
                kept = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                read_again.append(history - kept)
                history = usage["prompt_tokens"] + usage["completion_tokens"]
        messages.append({"role": "assistant", "content": answer})
        seconds.append(first_s)
    return seconds[1:], read_again[1:]


def served(settings: ConversationSettings) -> tuple[dict[str, list[float]], list[int]]:
    """What `rap serve` takes, and what a chat with it reads again.

    Returns:
        MiB of the process before the first request, without and with keeping, and the second
        result of `chat`.
    """
    from rap_env.models.device import resident_bytes

    idle_mib: dict[str, list[float]] = {"off": [], "on": []}
    read_again = list[int]()
    for _ in range(settings.repeats):
        for side, mib in idle_mib.items():
            with closing(Server(rap_command(settings.model, "--keep", side))) as server:
                server.wait_until_ready()
                mib.append(resident_bytes(server.proc)[1] / 2**20)
                if side == "on" and not read_again:
                    _, read_again = chat(server, settings.model, 0, _CHAT_ANSWER_TOKENS)
    return idle_mib, read_again


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
    limit_bytes = [2**32]
    engines = {side: engine_on(llm, limit_bytes, keep=side == "on") for side in ("off", "on")}
    measured = {name: {side: list[float]() for side in engines} for name in _BOUNDS}
    for repeat in range(settings.repeats):
        for side, engine in engines.items():
            users = settings.users if side == "on" else min(_READ_USERS, settings.users)
            values = (
                conversation(engine, repeat),
                shared_prompt(engine, repeat, users, settings.system_tokens),
                speed(engine, repeat),
            )
            for name, value in zip(_BOUNDS, values, strict=True):
                measured[name][side].append(value)
    stats = engines["on"].stats()
    fell_s, _ = give_back(engines["on"], limit_bytes, min(_FALL_BYTES, stats.kept_bytes))
    _, all_steps = give_back(engines["on"], limit_bytes, engines["on"].stats().kept_bytes)
    idle_mib, read_again = served(settings)
    keeping_mib = np.subtract(idle_mib["on"], idle_mib["off"]).tolist()
    targets = [
        *(
            target(
                what.format(**asdict(settings)),
                *ratios(measured[name]["on"], measured[name]["off"]),
                against="the same engine without keeping, one thread",
                **bound,
            )
            for name, (what, bound) in _BOUNDS.items()
        ),
        target("s until 200 kept MiB are given back", fell_s, at_most=_FALL_AT_MOST_S),
        target("decode steps that giving back all of it takes", all_steps, at_most=1),
        target("MiB of the idle server", *idle_mib["on"], at_most=_IDLE_AT_MOST_MIB),
        target("MiB that the idle server takes for keeping", *keeping_mib, at_most=1),
        target("known tokens that a turn of a chat reads again", *read_again, at_most=1),
    ]
    sides: dict[str, Any] = {name: spreads(values) for name, values in measured.items()}
    write_record(
        "conversations",
        settings,
        targets,
        **sides,
        kept_tokens=stats.kept_tokens,
        kept_bytes=stats.kept_bytes,
        kept_sequences=stats.kept_sequences,
        idle_mib=spreads(idle_mib),
    )
    for engine in engines.values():
        engine.close()


def spreads(sides: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The `spread` of the values of each side."""
    return {side: spread(values) for side, values in sides.items()}


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
            chat(server, settings.model, settings.repeats, ANSWER_TOKENS)
        for repeat in range(settings.repeats):
            for side, server in servers.items():
                first_s, _ = chat(server, settings.model, repeat, ANSWER_TOKENS)
                seconds[side].append(float(np.mean(first_s)))
    reached = target(
        f"first token of turns 2 to {TURNS} of a chat",
        *ratios(seconds["rap"], seconds["llama.cpp"]),
        at_most=_LLAMA_AT_MOST,
        against="llama.cpp's server, the same file, prompts kept, one thread",
    )
    settings.llama_server = Path(llama_server).name
    write_record("conversations_llama_cpp", settings, [reached], first_token_s=spreads(seconds))


if __name__ == "__main__":
    run_with_settings(ConversationSettings, main)
