"""``python -m experiments.serve``: an OpenAI-compatible server that keeps within its memory.

It listens at 127.0.0.1:8000 unless told otherwise, and ends in order at Ctrl+C or SIGTERM. Each
change of the mask is a JSON line in the run folder's ``decisions.jsonl``, whole after any kill.
"""

from __future__ import annotations

from pathlib import Path

from experiments.config import Config
from experiments.console import say
from experiments.launch import launch
from experiments.serving import (
    decision_log,
    open_engine,
    open_model,
    open_source,
    served_name,
    serving_settings,
)
from rap_env.runtime.decisions import DecisionLog
from rap_env.runtime.engine import Engine
from rap_env.runtime.policies import load_policy


def serve(config: Config, folder: Path) -> None:
    """Serve until told to end.

    Args:
        config: All settings.
        folder: The run's folder.

    Raises:
        RapError: The model, the policy, the memory or the address cannot be had, or the extra
            ``serve`` is not installed.
    """
    from rap_env.serving.app import create_app
    from rap_env.serving.server import Server, bind, url_of

    bound = bind(config.serve.host, config.serve.port)  # before the model is loaded in vain
    decisions = decision_log(config.serve, folder)
    try:
        llm = open_model(config)
        policy, memory = load_policy(config.serve.policy, llm), open_source(llm, config.serve)
        engine = open_engine(
            llm, config.serve, policy=policy, memory=memory, kind=Engine, log=decisions
        )
        settings = serving_settings(config, engine)
        app = create_app(engine, llm.tokenizer, settings)
        text = greeting(config, engine, memory.name, url_of(bound), decisions)
        Server(app, on_ready=lambda: say(text)).run(sockets=[bound])
        say(farewell(engine))
    finally:
        bound.close()
        if decisions is not None:
            decisions.close()


def greeting(
    config: Config, engine: Engine, memory: str, url: str, decisions: DecisionLog | None
) -> str:
    """What a person should know once the server can be asked."""
    controller = engine.controller
    model_name = served_name(config)
    chat = bool(getattr(engine.llm.tokenizer, "chat_template", None))
    asked = (
        '{"model": "%s", "messages": [{"role": "user", "content": "Hello!"}]}'
        if chat
        else '{"model": "%s", "prompt": "Once upon a time"}'
    ) % model_name
    route = "chat/completions" if chat else "completions"
    lines = [
        f"{model_name} is served at {url} (Ctrl+C ends it).",
        f"Memory: {controller.budget_bytes / 2**30:.2f} GiB now ({memory}); "
        f"policy: {controller.policy.name}; removed weights: {config.serve.residency}.",
    ]
    if decisions is not None:
        lines.append(f"Each change of the mask is a line in {decisions.path}.")
    lines += [
        f"Health: {url}/healthz, numbers: {url}/metrics. Ask it:",
        f"  curl {url}/v1/{route} -H 'Content-Type: application/json' -d '{asked}'",
    ]
    return "\n".join(lines)


def farewell(engine: Engine) -> str:
    """What was done, in a line."""
    stats = engine.stats()
    return (
        f"Ended: {stats.served} answers with {stats.tokens} tokens, {stats.cancelled} cancelled, "
        f"{engine.controller.switches} changes of the mask."
    )


if __name__ == "__main__":
    launch("serve", serve)
