"""Builds a server from its settings: model, policy, controller, engine and HTTP application."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastapi import FastAPI

from rap_env.errors import ServingSettingsError
from rap_env.models.device import choose_device, drop_unused_pages
from rap_env.models.live.elastic import ElasticLLM
from rap_env.policies.base import Policy, PolicyLike, as_policy
from rap_env.request import mebibytes
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_limit import GivenMemory, LiveLimit, open_memory
from rap_env.runtime.memory_monitor import (
    MemorySource,
    Meter,
    ResidentMeter,
    make_levels,
    process_meter,
)
from rap_env.runtime.records import ControllerSettings, EngineSettings
from rap_env.runtime.structured_output import GrammarCompiler
from rap_env.serving.app import create_app
from rap_env.serving.prompts import grammar_compiler
from rap_env.serving.served_model import (
    check_started,
    choose_policy,
    floors_of,
    load_served_model,
    lowers_weights,
)
from rap_env.serving.settings import ServerSettings

_TARGET_ITL_S = 0.1  # while prompts of others are read


@dataclass(frozen=True)
class ServerStack:
    """All parts of a server, not started; the application starts and closes the engine."""

    settings: ServerSettings
    engine: Engine
    app: FastAPI
    limit: LiveLimit | None


def build_stack(
    settings: ServerSettings,
    *,
    llm: ElasticLLM | None = None,
    policy: PolicyLike | None = None,
    memory: MemorySource | None = None,
    meter: Meter | None = None,
) -> ServerStack:
    """Build all parts of a server; parts that are not given are those of the settings.

    The residency of `llm` must be set.

    Raises:
        RapError: The model, the policy or the memory source is not available, or a limit does
            not suit the model.
    """
    limit = open_limit(settings) if memory is None else None
    live, chosen, grammars = _load(settings, limit, llm, policy)
    controller = _controller(settings, limit, live, chosen, memory, meter)
    engine = _engine(settings, limit, controller)
    app = create_app(engine, live.tokenizer, settings, grammars)
    if llm is None and limit is not None and limit.of_process:
        check_started(settings.model, limit)
    return ServerStack(settings, engine, app, limit)


def open_limit(settings: ServerSettings) -> LiveLimit | None:
    """The limit of the settings; None if the budget is the system's free memory.

    Raises:
        ServingSettingsError: `memory_file` exists and does not hold a size, or the memory of
            the process is limited and the model is not on a CPU under Linux.
    """
    if settings.model_bytes is not None:
        return LiveLimit("model_memory", settings.model_bytes, settings.memory_file)
    if settings.process_bytes is None:
        return None
    device = choose_device(settings.device)
    if device.type != "cpu" or sys.platform != "linux":
        raise ServingSettingsError(
            f"memory={settings.memory} limits the resident memory of the process, which is measured"
            f" only for a model on a CPU under Linux, not on {device} under {sys.platform}; set "
            "model_memory, the bytes of the model alone, instead."
        )
    return LiveLimit("memory", settings.process_bytes, settings.memory_file)


def _load(
    settings: ServerSettings,
    limit: LiveLimit | None,
    llm: ElasticLLM | None,
    policy: PolicyLike | None,
) -> tuple[ElasticLLM, Policy, GrammarCompiler]:
    """Load all that takes memory besides requests, so that no later request pays for it."""
    llm = load_served_model(settings, limit) if llm is None else llm
    if llm.tokenizer is None:
        raise ServingSettingsError(
            f"{llm.name} has no tokenizer, which a server needs for prompts; add its files to the "
            "model's folder."
        )
    grammars = grammar_compiler(llm, llm.tokenizer, llm.facts.vocab_size)
    grammars.load()
    chosen = choose_policy(settings, llm, limit) if policy is None else as_policy(policy)
    # Else plans make them later, or read those of a model that is loaded on demand.
    if limit is not None and not llm.on_demand and lowers_weights(chosen, llm, limit):
        make_levels(llm, chosen)
    drop_unused_pages()
    return llm, chosen, grammars


def _controller(
    settings: ServerSettings,
    limit: LiveLimit | None,
    llm: ElasticLLM,
    policy: Policy,
    memory: MemorySource | None,
    meter: Meter | None,
) -> RuntimeController:
    """Make the controller, which keeps the model within its memory and its floor of quality."""
    if memory is None:
        meter = meter or process_meter(llm)
        if limit is None:
            reserve = settings.reserve_bytes
            memory = open_memory(settings.memory, device=llm.device, reserve_bytes=reserve)
        else:
            resident = meter if isinstance(meter, ResidentMeter) else None
            memory = GivenMemory(limit, meter=resident if limit.of_process else None)
    floor, most = floors_of(settings, policy)
    return RuntimeController(
        llm,
        policy,
        memory,
        ControllerSettings(
            max_delta_nll=floor, most_delta_nll=most, chunk_tokens=settings.prefill_chunk_tokens
        ),
        meter=meter,
    )


def _engine(
    settings: ServerSettings, limit: LiveLimit | None, controller: RuntimeController
) -> Engine:
    """Make the engine, unless no request fits the limit."""
    engine_settings = EngineSettings(
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        max_seq_len_tokens=settings.max_seq_len_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        queue_timeout_s=settings.queue_timeout_s,
        target_itl_s=_TARGET_ITL_S,
        keep=settings.keep == "on",
        keep_delta_nll=settings.keep_delta_nll,
        keep_file_bytes=settings.most_file_bytes,
    )
    engine = Engine(controller, engine_settings)
    if limit is not None:
        one, chooser = BatchShape(1, 1), controller.chooser
        least = controller.estimator.memory.peak_bytes(chooser.smallest(one, 1), one.request(1))
        limit.attach(settings.model, least, controller.monitor.source)
        if chooser.max_delta_nll is not None and (problem := engine.nothing_fits()):
            raise ServingSettingsError(problem)
    return engine


def greeting(stack: ServerStack, url: str) -> str:
    """Text for the user once the server answers."""
    controller, name = stack.engine.controller, stack.settings.served_name
    lines = [
        f"{name} is served at {url} (Ctrl+C ends it).",
        _limit_text(controller),
        f"Policy: {controller.chooser.policy.name}; unused weights: {stack.settings.residency}.",
    ]
    return "\n".join(lines)


def _limit_text(controller: RuntimeController) -> str:
    """What a user should know of the memory limit, as a sentence."""
    monitor = controller.monitor
    source, budget = monitor.source, mebibytes(max(0, monitor.budget_bytes))
    if source.process_bytes is not None and source.other_bytes is not None:
        whole, others = mebibytes(source.process_bytes), mebibytes(source.other_bytes)
        return (
            f"Memory: at most {whole} for the whole process, of which {others} are everything but "
            f"the model; it may take {budget} now."
        )
    return f"Memory: at most {budget} for the model now ({source.name})."
