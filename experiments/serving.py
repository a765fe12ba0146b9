"""From settings to an engine and its server, for the programs that serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from experiments.config import Config, ServeConfig
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.loading import load_llm
from rap_env.policy import MaskPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_source import MemorySource, open_memory

if TYPE_CHECKING:
    from rap_env.llm.live import Restore
    from rap_env.llm.residency import Residency
    from rap_env.serving.settings import ServingSettings

EngineKind = TypeVar("EngineKind", bound=Engine)

DECISIONS_FILE = "decisions.jsonl"


def open_model(config: Config) -> ElasticLLM:
    """The model that is served, with its residency set.

    Raises:
        RapError: It cannot be had.
    """
    llm = load_llm(config.model.name, device=config.model.device, dtype=config.model.dtype)
    llm.set_residency(cast("Residency", config.serve.residency))
    return llm


def open_source(llm: ElasticLLM, serve: ServeConfig) -> MemorySource:
    """Who says the budget.

    Raises:
        RapError: There is no such source, or the system does not tell.
    """
    return open_memory(serve.memory_source, device=llm.device, reserve_bytes=serve.reserve_bytes)


def open_engine(
    llm: ElasticLLM,
    serve: ServeConfig,
    *,
    policy: MaskPolicy,
    memory: MemorySource,
    kind: Callable[..., EngineKind],
    log: DecisionLog | None = None,
    **controls: Any,
) -> EngineKind:
    """An engine with its controller, not started.

    Args:
        llm: The model.
        serve: The settings.
        policy: Who chooses masks.
        memory: Who says the budget.
        kind: `Engine`, or a class made of it.
        log: Where decisions are logged.
        **controls: More arguments of the `RuntimeController`.

    Raises:
        InvalidRequestError: A limit does not suit the model.
    """
    controller = RuntimeController(llm, policy, memory, log=log, **controls)
    return kind(
        llm,
        controller,
        max_batch_size=serve.max_batch_size,
        max_queue=serve.max_queue,
        max_seq_len_tokens=serve.max_seq_len_tokens,
        prefill_chunk_tokens=serve.prefill_chunk_tokens,
        restore=cast("Restore", serve.restore),
        queue_timeout_s=serve.queue_timeout_s,
    )


def decision_log(serve: ServeConfig, folder: Path) -> DecisionLog | None:
    """Where decisions are logged, if anywhere."""
    if serve.decisions is None:
        return None
    default = serve.decisions == "default"
    return DecisionLog(folder / DECISIONS_FILE if default else Path(serve.decisions))


def served_name(config: Config) -> str:
    """What clients write as ``model``."""
    return config.serve.model_name or config.model.name


def serving_settings(config: Config, engine: Engine) -> ServingSettings:
    """Names and limits of the server.

    Raises:
        MissingDependencyError: The extra ``serve`` is not installed.
        ServingSettingsError: A limit makes no sense.
    """
    from rap_env.serving.settings import ServingSettings

    serve = config.serve
    return ServingSettings(
        model_name=served_name(config),
        policy_name=engine.controller.policy.name,
        fingerprint=engine.llm.fingerprint,
        max_body_bytes=serve.max_body_bytes,
        max_connections=serve.max_connections,
        max_prompt_tokens=serve.max_prompt_tokens,
        max_new_tokens=serve.max_new_tokens,
        default_chat_tokens=serve.default_chat_tokens,
        body_timeout_s=serve.body_timeout_s,
        shutdown_grace_s=serve.shutdown_grace_s,
    )
