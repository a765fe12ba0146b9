"""Builds a server from its settings: model, policy, controller, engine and HTTP application."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rap_env.errors import ServingSettingsError, counted
from rap_env.extras import require_extra
from rap_env.models.device import drop_unused_pages, use_threads
from rap_env.models.live.elastic import ElasticLLM
from rap_env.policies.base import Policy, PolicyLike, as_policy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import make_levels, process_meter
from rap_env.runtime.memory_source import MemorySource
from rap_env.runtime.records import DecisionLog
from rap_env.serving import limits
from rap_env.serving.preflight import check_before_loading
from rap_env.serving.served_model import choose_policy, floor_of, load_served_model
from rap_env.serving.settings import DEFAULT_MOST_DELTA_NLL, ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rap_env.runtime.running import Restore
    from rap_env.runtime.structured_output import GrammarCompiler


@dataclass(frozen=True)
class ServerStack:
    """All parts of a server, not started; the application starts and closes the engine."""

    settings: ServerSettings
    engine: Engine
    app: FastAPI
    decisions: DecisionLog | None
    limit: limits.LiveLimit | None

    def close(self) -> None:
        """Close the log of decisions."""
        if self.decisions is not None:
            self.decisions.close()


def build_stack(
    settings: ServerSettings,
    *,
    llm: ElasticLLM | None = None,
    policy: PolicyLike | None = None,
    memory: MemorySource | None = None,
    **controls: Any,
) -> ServerStack:
    """Build all parts of a server; parts that are not given are those of the settings.

    The residency of `llm` must be set. `controls` are further arguments of `RuntimeController`.

    Raises:
        RapError: The model, the policy or the memory source is not available, a limit does not
            suit the model, or the extra ``serve`` is not installed.
    """
    require_extra("serve", "Serving")
    decisions = DecisionLog(settings.decisions) if settings.decisions else None
    limit = None
    try:
        if memory is None:
            limit = limits.open_limit(settings)
        served = _load(settings, limit, llm, policy)
        controller = _fund(settings, limit, served, memory, log=decisions, **controls)
        engine, app = _start(settings, limit, served, controller)
        if llm is None and limit is not None and limit.of_process:
            limits.check_started(settings.model, limit)
    except BaseException:
        if decisions is not None:
            decisions.close()
        raise
    return ServerStack(settings, engine, app, decisions, limit)


@dataclass(frozen=True)
class _Served:
    """What is loaded: the model, its policy, and what compiles the grammars of answers."""

    llm: ElasticLLM
    policy: Policy
    grammars: GrammarCompiler


def _load(
    settings: ServerSettings,
    limit: limits.LiveLimit | None,
    llm: ElasticLLM | None,
    policy: PolicyLike | None,
) -> _Served:
    """Load all that takes memory besides requests, so that no later request pays for it."""
    from rap_env.serving.prompts import grammar_compiler

    llm = load_served_model(settings, limit) if llm is None else llm
    if llm.tokenizer is None:
        raise ServingSettingsError(
            f"{llm.name} has no tokenizer, which a server needs for prompts; add its files to the "
            "model's folder."
        )
    grammars = grammar_compiler(llm, llm.tokenizer, llm.facts.vocab_size)
    grammars.load()
    chosen = choose_policy(settings, llm, limit) if policy is None else as_policy(policy)
    make_levels(llm, chosen)
    drop_unused_pages()
    return _Served(llm, chosen, grammars)


def _fund(
    settings: ServerSettings,
    limit: limits.LiveLimit | None,
    served: _Served,
    memory: MemorySource | None,
    **controls: Any,
) -> RuntimeController:
    """Make the controller, which keeps the model within its memory and its floor of quality."""
    llm, policy = served.llm, served.policy
    if memory is None:
        if controls.get("meter") is None:
            controls["meter"] = process_meter(llm)
        memory = limits.open_budget(settings, llm, limit, controls["meter"])
    controller = RuntimeController(
        llm,
        policy,
        memory,
        max_delta_nll=floor_of(settings, policy),
        most_delta_nll=DEFAULT_MOST_DELTA_NLL if settings.max_delta_nll == "auto" else None,
        chunk_tokens=settings.prefill_chunk_tokens,
        **controls,
    )
    strictest = settings.min_quality_per_request
    if strictest is not None:
        controller.chooser.check_bound("min_quality_per_request", strictest)
    return controller


def _start(
    settings: ServerSettings,
    limit: limits.LiveLimit | None,
    served: _Served,
    controller: RuntimeController,
) -> tuple[Engine, FastAPI]:
    """Make the engine and the application, unless no request fits the limit."""
    from rap_env.serving.app import create_app

    llm = served.llm
    engine = Engine(
        llm,
        controller,
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        max_seq_len_tokens=settings.max_seq_len_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        restore=cast("Restore", settings.restore),
        queue_timeout_s=settings.queue_timeout_s,
        target_itl_s=settings.target_itl_s,
    )
    if limit is not None:
        limit.attach(limits.least_check(settings.model, llm, controller), engine.nothing_fits)
        if controller.chooser.max_delta_nll is not None and (problem := limit.nothing_fits()):
            raise ServingSettingsError(problem)
    return engine, create_app(engine, llm.tokenizer, settings, limit, served.grammars)


def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: Settings of the server.
        say: Shows a text to the user.

    Raises:
        RapError: As for `build_stack`, the address is not available, or `check_access`,
            `check_address` or `check_before_loading` rejects the settings.
    """
    require_extra("serve", "Serving")
    from rap_env.serving.access import check_access, check_address
    from rap_env.serving.logs import server_logging
    from rap_env.serving.server import Server, bind, url_of

    check_access(settings)
    # These fail before the model is loaded.
    with server_logging(settings), bind(settings.host, settings.port) as bound:
        check_address(bound, settings)
        check_before_loading(settings)
        if settings.threads is not None:
            use_threads(settings.threads)
        stack = build_stack(settings)
        try:
            text = greeting(stack, url_of(bound, tls=settings.ssl_certfile is not None))
            has_keys = settings.api_key_file or settings.admin_key_file
            on_hangup = stack.app.state.service.reload_keys if has_keys else None
            Server(stack.app, lambda: say(text), on_hangup).run(sockets=[bound])
            say(farewell(stack.engine))
        finally:
            stack.close()


def greeting(stack: ServerStack, url: str) -> str:
    """Text for the user once the server answers."""
    controller, name = stack.engine.controller, stack.settings.served_name
    route = "completions"
    body: dict[str, Any] = {"model": name, "prompt": "Once upon a time"}
    if stack.engine.llm.tokenizer.chat_template:
        message = {"role": "user", "content": "Hello!"}
        route, body = "chat/completions", {"model": name, "messages": [message]}
    lines = [
        f"{name} is served at {url} (Ctrl+C ends it).",
        limits.limit_text(controller),
        f"Policy: {controller.chooser.policy.name}; unused weights: {stack.settings.residency}.",
    ]
    chooser = controller.chooser
    if (floor := chooser.max_delta_nll) is not None:
        most = chooser.most_delta_nll
        loaded = "" if most == floor else f", and of {most} while others wait"
        lines.append(
            f"Plans that serve have a predicted rise in NLL of at most {floor} nats per token"
            f"{loaded} (max_delta_nll)."
        )
    longest = stack.settings.max_prompt_tokens or stack.engine.longest_prompt_tokens()
    lines.append(f"Prompts may have {longest} tokens.")
    if stack.decisions is not None:
        lines.append(f"Each change of the plan is a line in {stack.decisions.path}.")
    headers = "-H 'Content-Type: application/json'"
    if stack.settings.api_key_file is not None:
        headers += " -H 'Authorization: Bearer KEY'"
    lines += [
        f"Health: {url}/healthz, metrics: {url}/metrics. Try it:",
        f"  curl {url}/v1/{route} {headers} -d '{json.dumps(body)}'",
    ]
    return "\n".join(lines)


def farewell(engine: Engine) -> str:
    """Summary of what the engine did, in one line."""
    stats = engine.stats()
    return (
        f"Ended: {counted(stats.served, 'answer')} with {counted(stats.tokens, 'token')}, "
        f"{stats.cancelled} cancelled, the plan changed "
        f"{counted(engine.controller.switcher.switches, 'time')}."
    )
