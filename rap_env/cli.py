"""Command ``rap``: serve a model, choose a plan, export it, fetch a model, show versions.

Commands import torch only if they need it. Answers go to stdout (as JSON with ``--json``),
log lines to stderr. An error is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from rap_env.command_options import (
    Command,
    combined,
    facts_of,
    json_option,
    plan_lines,
    request_options,
    setting_option,
    show,
)
from rap_env.errors import RapError
from rap_env.export.commands import export, prune
from rap_env.extras import missing_extra
from rap_env.memory import MemoryModel
from rap_env.request import Request, human_bytes, parse_bytes
from rap_env.serving.settings import (
    DEFAULT_MAX_DELTA_NLL,
    DEFAULT_MOST_DELTA_NLL,
    ServerSettings,
)
from rap_env.specs import Setting, settings_of
from rap_env.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rap")
def cli() -> None:
    """Runtime-adaptive pruning of language models."""


cli.add_command(prune)
cli.add_command(export)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Arguments; None takes those of the process.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rap_env").setLevel(logging.INFO)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["rap", *given])
        code = cli.main(arguments, prog_name="rap", standalone_mode=False, obj=command)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        sentence = error.format_message()
    except RapError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        known = missing_extra(error, "This command")
        if known is error:
            raise
        sentence = str(known)
    except OSError as error:
        sentence = str(error)
        if error.filename is not None and error.strerror:
            sentence = (
                f"Cannot use {error.filename}: {error.strerror}. Check that the path is of the "
                "right kind (file or folder) and that you may write to it; the cache is the "
                "folder that $RAP_CACHE_DIR names."
            )
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    is_help = sentence.startswith("Usage:")  # without a command, click raises its help text
    click.echo(sentence if is_help else f"Error: {sentence}", err=True)
    sys.exit(2)


_SETTINGS = settings_of(ServerSettings)


def _server_option(name: str) -> Command:
    """Option for a setting of the server, None unless it is given; ``none`` means None.

    A setting that is true or false is a flag.
    """
    option, entry, default = (
        f"--{name.replace('_', '-')}",
        _SETTINGS[name],
        getattr(ServerSettings, name),
    )
    if bool in entry.types:
        return click.option(option, name, is_flag=True, default=None, help=entry.help)
    metavar = "TEXT" if str in entry.types else "NUMBER"
    if entry.types == (str,) and entry.choices:
        metavar = "|".join(entry.choices)
    shown = "none" if default is None else default
    return click.option(option, name, metavar=metavar, help=f"{entry.help} [{shown}]")


def _parse_settings(options: dict[str, str | bool | None]) -> dict[str, Any]:
    """Values of the options that were given; `ServerSettings` checks them."""
    values: dict[str, Any] = {}
    for name, text in options.items():
        if text is not None:
            values[name] = None if text == "none" else text
            types = _SETTINGS[name].types
            if isinstance(text, str) and (str not in types or float in types):
                with contextlib.suppress(ValueError, TypeError):
                    values[name] = json.loads(values[name])
    return values


class _ServeCommand(click.Command):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group, in the order of the settings."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        title = "Options"
        for parameter in self.get_params(ctx):
            entry = _SETTINGS.get(parameter.name or "", Setting(group="Options"))
            title = entry.group or title
            groups.setdefault(title, []).append(parameter.get_help_record(ctx) or ("", ""))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


@cli.command(short_help="Serve a model over HTTP.", cls=_ServeCommand)
@combined(*map(_server_option, _SETTINGS))
def serve(**options: str | bool | None) -> None:
    """Serve a model over HTTP within a memory budget.

    The API is that of OpenAI: /v1/chat/completions, /v1/completions and /v1/models.
    """
    settings = ServerSettings(**_parse_settings(options))
    from rap_env.serving.startup import serve as serve_until_interrupted

    serve_until_interrupted(settings, click.echo)


@cli.command()
@request_options(required=True)
@setting_option("prepare")
@click.option(
    "--allow-removal", is_flag=True, help=settings_of(ServerSettings)["allow_removal"].help
)
@json_option
def choose(
    batch: int,
    seq: int,
    budget: str,
    policy: str,
    model: str,
    device: str,
    dtype: str,
    weights: str,
    prepare: str,
    allow_removal: bool,
    as_json: bool,
) -> None:
    """Choose a plan for a request and show its memory.

    The default model needs neither its weights nor torch. Any other one that does not fit as it
    is, is prepared first, once (`rap prepare`).
    """
    from rap_env.policies.loading import load_policy
    from rap_env.policies.packaged_files import find_delta_nll, lacks_costs

    request = Request(batch, seq, parse_bytes("--budget", budget))
    memory = _memory_of(model, device, dtype, weights)
    too_large = memory.native_peak_bytes(batch, seq) > request.budget_bytes
    may_prepare = (prepare, policy, weights) == ("on", "knapsack", "native")
    if may_prepare and too_large and lacks_costs(memory):
        from rap_env.importance.preparation import prepare as prepare_model

        prepare_model(model, device=device, dtype=dtype)
        memory = _memory_of(model, device, dtype, weights)
    facts = memory.facts
    chooser = load_policy(policy, memory, allow_removal=allow_removal)
    started = time.perf_counter()
    plan = chooser.choose(request)
    seconds = time.perf_counter() - started
    rise, source = find_delta_nll(memory, chooser, plan, seq)
    parts = memory.breakdown(plan, request)
    answer = {
        "model": facts.name,
        "dtype": facts.dtype,
        "policy": policy,
        "request": asdict(request),
        "removed": list(plan.removed_names),
        "levels": plan.levels,
        "fits": parts.peak <= request.budget_bytes,
        "peak_bytes": parts.peak,
        "native_peak_bytes": memory.native_peak_bytes(batch, seq),
        "bytes": parts.as_dict(),
        "delta_nll": rise,
        "delta_nll_source": source,
        "decision_s": seconds,
    }
    if not as_json:  # no table of a plan that cannot be used
        memory.check_fits(plan, request)
    show(answer, _choice_text(answer), as_json)
    memory.check_fits(plan, request)


def _memory_of(model: str, device: str, dtype: str, weights: str) -> MemoryModel:
    """The byte arithmetic of a model; messages name commands for it, which take its path."""
    facts = facts_of(model, device, dtype, weights)
    return MemoryModel(replace(facts, name=model) if Path(model).exists() else facts)


def _choice_text(answer: dict[str, Any]) -> str:
    shape, budget = answer["request"], answer["request"]["budget_bytes"]
    rise = answer["delta_nll"]
    lines = [
        f"{answer['model']} ({answer['dtype']}), {shape['batch_size']} x "
        f"{shape['seq_len_tokens']} tokens, policy {answer['policy']}:",
        *plan_lines(answer, budget),
        f"Budget: {human_bytes(budget)}; native peak: {human_bytes(answer['native_peak_bytes'])}",
    ]
    if rise is not None and rise > (floor := DEFAULT_MAX_DELTA_NLL):
        lines.append(
            f"`rap serve` serves no plan above {floor} by default, and none above "
            f"{DEFAULT_MOST_DELTA_NLL} while requests wait (--max-delta-nll)."
        )
    if any("window" in level for level in answer["levels"].values()):
        lines.append("windowN: the first 32 and the last N tokens; those between are lost.")
    lines.append(f"Decision time: {1000 * answer['decision_s']:.2f} ms")
    return "\n".join(lines)


@cli.command(short_help="Download and convert a model.")
@click.argument("model", default="smollm2-135m")
@click.option("--accept-licence", is_flag=True, help="Accept the terms that the model comes under.")
@json_option
def fetch(model: str, accept_licence: bool, as_json: bool) -> None:
    """Download and convert MODEL: smollm2-135m (the default) or another alias.

    The others are qwen2.5-coder-0.5b, qwen2.5-coder-1.5b and gemma3-270m.

    A model that is cached already is only checked. gemma3-270m comes under the Gemma Terms of
    Use, https://ai.google.dev/gemma/terms, and is downloaded only with --accept-licence.
    """
    from rap_env.models.files.sources import fetch_model

    cached = fetch_model(model, accept_licence=accept_licence)
    answer = {"name": cached.name, "folder": str(cached.folder), "bytes": cached.size_bytes}
    show(answer, f"{cached.name}: {cached.size_bytes:,} bytes in {cached.folder}", as_json)


@cli.command(short_help="Make levels and costs of a model of your own.")
@click.argument("model")
@click.option("--text", type=Path, help="Prompts to make them with: text, or JSON lines of chats.")
@click.option("--out", type=Path, help="Also write both into one file, for another machine.")
@click.option("--memory", metavar="BYTES", help="Most resident memory of all processes, as 1GiB.")
@click.option(
    "--bits",
    type=click.IntRange(2, 4),
    default=2,
    show_default=True,
    help="Fewest bits of weights. Levels below four bits take most of the time.",
)
@click.option("--thorough", is_flag=True, help="Make levels by GPTQ: better, in about four times.")
@setting_option("device")
@setting_option("dtype")
@json_option
def prepare(
    model: str,
    text: Path | None,
    out: Path | None,
    memory: str | None,
    bits: int,
    thorough: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Make the weights of few bits of MODEL and measure what each level costs; once, in minutes.

    MODEL is a hub id, a folder or a GGUF file of a known family. serve, choose and export use
    the result from then on. A run that was ended continues where it was.
    """
    from rap_env.importance.preparation import prepare as prepare_model
    from rap_env.models.files.prepared_files import write_prepared

    memory_bytes = None if memory is None else parse_bytes("--memory", memory)
    costs, path = prepare_model(
        model,
        text=text,
        bits=bits,
        memory_bytes=memory_bytes,
        device=device,
        dtype=dtype,
        thorough=thorough,
    )
    if out is not None:
        write_prepared(path, out)
    answer = {
        "model": costs.provenance["model"],
        "costs": str(path),
        "file": None if out is None else str(out),
        "seconds": costs.seconds,
        "evaluations": costs.evaluations,
        "delta_nll_by_level": costs.sums_by_level(),
    }
    show(answer, _preparation_text(answer, model), as_json)


def _preparation_text(answer: dict[str, Any], model: str) -> str:
    rows = [
        f"  {kind:<12}{level:<18}{rise:>9.4f}"
        for kind, levels in answer["delta_nll_by_level"].items()
        for level, rise in levels.items()
    ]
    return "\n".join(
        [
            f"{answer['model']} is prepared ({answer['seconds']:.0f} s).",
            "Predicted rise in NLL if all items of a kind have a level, nats per token:",
            *rows,
            f"Costs: {answer['costs']}",
            *([] if answer["file"] is None else [f"Costs and levels: {answer['file']}"]),
            "They are used from now on, for example by:",
            f"  rap serve --model {shlex.quote(model)}",
        ]
    )


@cli.command(short_help="Show versions, the cache and score tables.")
@json_option
def info(as_json: bool) -> None:
    """Show versions, device, the cache folder and the score tables in the package."""
    from rap_env.installation import describe, description

    answer = describe()
    show(answer, description(answer), as_json)


if __name__ == "__main__":
    main()
