"""Builds a server from its settings: model, policy, controller, engine and HTTP application."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from rap_env.errors import ArtifactError, ServingSettingsError, counted
from rap_env.extras import require_extra
from rap_env.memory import MemoryModel
from rap_env.model_facts import HasFacts
from rap_env.models.device import drop_unused_pages, use_threads
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import made_apart
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.tensors import copy_to_memory
from rap_env.policies.base import Policy, PolicyLike, as_policy
from rap_env.policies.loading import OrderPolicy, load_policy
from rap_env.policies.packaged_files import KNAPSACKS
from rap_env.policies.uniform import middle_first, uniform_plans
from rap_env.request import Request
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_meter import make_levels
from rap_env.runtime.memory_source import MemorySource
from rap_env.runtime.plan_chooser import predicts
from rap_env.serving import limits
from rap_env.serving.preflight import check_before_loading
from rap_env.serving.settings import DEFAULT_MOST_DELTA_NLL, ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rap_env.models.caches.kv_cache import Restore
    from rap_env.models.weights.residency import Residency

log = logging.getLogger(__name__)

_SHORT_TOKENS = 256
"""Tokens of the request that a server should be able to serve."""


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


def load_served_model(
    settings: ServerSettings, limit: limits.LiveLimit | None = None
) -> ElasticLLM:
    """Load the model, set its residency, and attach the stubs of the settings.

    With a limit of the process, the start is checked before the weights are read, and a model that
    has to be converted first is converted in another process.
    """
    limits_process = limit is not None and limit.of_process
    with made_apart() if limits_process else nullcontext():
        llm = load_llm(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            weights=settings.weights,
            lean=settings.repair != "library",  # a lean model cannot be fitted to
            before_weights=partial(limits.check_start, settings.model, limit)
            if limit is not None and limits_process
            else None,
        )
    if settings.residency == "resident":  # else weights are copied in any case
        copy_to_memory(llm.model)
    llm.set_residency(cast("Residency", settings.residency))
    if settings.repair != "none":
        from rap_env.repair.cached_library import open_library  # loads what scores models

        llm = open_library(settings.repair, llm).attach(llm)
    return llm


def choose_policy(
    settings: ServerSettings, llm: ElasticLLM, limit: limits.LiveLimit | None
) -> Policy:
    """The policy of the settings, without levels that take minutes to make and are not needed.

    They are needed if without them one short request does not fit the limit within the floor.
    """
    chosen = load_serving_policy(settings, llm)
    if not (absent := llm.absent_levels(chosen.weight_levels)):
        return chosen
    fewer = load_serving_policy(settings, MemoryModel(llm.facts.without_levels(absent)))
    if limit is not None:
        budget_bytes = limit() - (limits.other_bytes(llm) if limit.of_process else 0)
        request = Request(1, _SHORT_TOKENS, max(1, budget_bytes))
        plan = fewer.choose(request)
        rise, floor = fewer.delta_nll(plan, _SHORT_TOKENS), _floor(settings, fewer)
        too_bad = rise is not None and floor is not None and rise > floor
        if too_bad or MemoryModel(llm).peak_bytes(plan, request) > budget_bytes:
            return chosen
    log.info(
        "Weights of %s are not used, because they are not made; `rap fetch --levels %s` makes them "
        "once, in minutes.", ", ".join(sorted(absent)), settings.model,
    )  # fmt: skip
    return fewer


def load_serving_policy(settings: ServerSettings, model: HasFacts) -> Policy:
    """The policy of the settings; for a model without level costs, one that needs none.

    Raises:
        RapError: As for `load_policy`, with any other policy.
    """
    try:
        return load_policy(settings.policy, model)
    except ArtifactError as error:
        if settings.policy not in KNAPSACKS:
            raise
        log.warning(
            "%s Until then the server lowers all caches uniformly, then all weights, and then "
            "removes whole layers, the last ones first.", error,
        )  # fmt: skip
    memory = MemoryModel(model.facts)
    order = middle_first(memory.facts.num_layers)
    return OrderPolicy(memory, order, uniform_plans(memory.facts), "uniform")


def build_stack(
    settings: ServerSettings,
    *,
    llm: ElasticLLM | None = None,
    policy: PolicyLike | None = None,
    memory: MemorySource | None = None,
    engine_class: type[Engine] = Engine,
    **controls: Any,
) -> ServerStack:
    """Build all parts of a server; parts that are not given are those of the settings.

    The residency of `llm` must be set. `controls` are further arguments of `RuntimeController`.

    Raises:
        RapError: The model, the policy or the memory source is not available, a limit does not
            suit the model, or the extra ``serve`` is not installed.
    """
    require_extra("serve", "Serving")
    from rap_env.serving.app import create_app
    from rap_env.serving.prompts import grammar_compiler

    decisions = DecisionLog(settings.decisions) if settings.decisions else None
    try:
        limit = limits.open_limit(settings) if memory is None else None
        loaded = llm is None
        llm = load_served_model(settings, limit) if llm is None else llm
        grammars = grammar_compiler(llm, llm.tokenizer, llm.facts.vocab_size)
        grammars.load()  # before the first baseline: a later request must not pay for it
        chosen = choose_policy(settings, llm, limit) if policy is None else as_policy(policy)
        make_levels(llm, chosen)
        drop_unused_pages()
        if memory is None:
            meter = controls.pop("meter", None)
            memory, controls["meter"] = limits.open_budget(settings, llm, limit, meter)
            if loaded and limit is not None and limit.of_process:
                limits.check_started(settings.model, limit)
        floor = _floor(settings, chosen)
        controller = RuntimeController(
            llm,
            chosen,
            memory,
            max_delta_nll=floor,
            most_delta_nll=DEFAULT_MOST_DELTA_NLL if settings.max_delta_nll == "auto" else None,
            log=decisions,
            chunk_tokens=settings.prefill_chunk_tokens,
            **controls,
        )
        strictest = settings.min_quality_per_request
        if strictest is not None:
            controller.chooser.check_bound("min_quality_per_request", strictest)
        if limit is not None:
            limit.nothing_fits = controller.nothing_fits
            if controller.chooser.max_delta_nll is not None and (problem := limit.nothing_fits()):
                raise ServingSettingsError(problem)
        engine = engine_class(
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
        app = create_app(engine, llm.tokenizer, settings, limit, grammars)
    except BaseException:
        if decisions is not None:
            decisions.close()
        raise
    return ServerStack(settings, engine, app, decisions, limit)


def _floor(settings: ServerSettings, policy: Policy) -> float | None:
    """The floor of the settings; none, with a warning, if it is the default and unpredictable."""
    if settings.max_delta_nll != "auto" or predicts(policy):
        return settings.floor_if_predicted
    log.warning(
        "Policy %s predicts no rise in NLL, so answers have no floor of quality; knapsack and rap "
        "predict it for models with measured level costs.",
        policy.name,
    )
    return None


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
