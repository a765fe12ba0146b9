"""What the commands of `rap` share: options of requests and models, facts, and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import click

from rap_env.levels import WEIGHT_LEVELS, CacheLevel
from rap_env.memory import ModelFacts
from rap_env.paths import prepared_dir
from rap_env.plan import EMBEDDINGS, layer_ranges, layers_by_level
from rap_env.serving.settings import ServerSettings
from rap_env.specs import settings_of

MIB = 2**20

_BUDGET = "Bytes of the model alone, as in `rap serve --model-memory`; such as 300MiB."

Command = Callable[..., Any]


def show(answer: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the answer of a command, as JSON or as text."""
    click.echo(json.dumps(answer, indent=2) if as_json else text)


def combined(*options: Command) -> Command:
    """Combine several options into one decorator."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def setting_option(name: str, default: str | None = None) -> Command:
    """Option of a command that shares a setting with the server."""
    default = default or getattr(ServerSettings, name)
    return click.option(
        f"--{name}", default=default, show_default=True, help=settings_of(ServerSettings)[name].help
    )


def request_options(
    required: bool,
    policy: Command | None = None,
    weights: str | None = "native",
    dtype: str = "auto",
) -> Command:
    """Options of a request and the model.

    Args:
        required: Whether a request has to be given.
        policy: The option of the policy, that of the server by default.
        weights: The default format of weights; None if the command has one format.
        dtype: The default dtype.
    """
    chosen = click.option(
        "--weights",
        default=weights,
        show_default=True,
        help="Format of the weights: native (as the model's file has them) or bf16.",
    )
    return combined(
        click.option("--batch", type=int, required=required, help="Number of sequences."),
        click.option("--seq", type=int, required=required, help="Total tokens per sequence."),
        click.option("--budget", required=required, metavar="BYTES", help=_BUDGET),
        policy or setting_option("policy"),
        *map(setting_option, ("model", "device")),
        setting_option("dtype", dtype),
        *([] if weights is None else [chosen]),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


def facts_of(model: str, device: str, dtype: str, weights: str) -> ModelFacts:
    """Facts of a model; the weights of any but the default one are read once, for a fingerprint."""
    if weights in ("native", "bf16"):
        from rap_env.policies.packaged_files import default_facts

        facts = default_facts(weights)
        same = model in (facts.name, facts.name.partition("@")[0])
        prepared = prepared_dir(facts.fingerprint).exists()
        if same and dtype in ("auto", facts.dtype) and not prepared:
            return facts
    from rap_env.models.files.loading import load_llm

    return load_llm(
        model,
        device=device,
        dtype=dtype,
        weights=weights,
        lean=True,
        on_demand=True,
        quick_levels=True,
    ).facts


def byte_lines(answer: dict[str, Any], budget: int) -> list[str]:
    """A line for each part of the memory in an answer, and one for their sum."""
    return [
        f"  {name.removesuffix('_bytes').replace('_', ' '):<14}{size / MIB:>9.1f} MiB"
        f"{100 * size / budget:>6.1f} % of the budget"
        for name, size in [*answer["bytes"].items(), ("peak", answer["peak_bytes"])]
        if size
    ]


def plan_lines(answer: dict[str, Any], budget: int) -> list[str]:
    """What an answer says of its plan: levels, bytes and the rise in NLL."""
    levels = level_lines(answer["levels"])
    return [*levels, *byte_lines(answer, budget), *rise_lines(answer)]


def level_lines(levels: dict[str, str]) -> list[str]:
    """A line for each level and kind of item in the ladder's order, and one for removed blocks."""
    layers = layers_by_level(levels)
    removed = {kind: layers.pop(("removed", kind), []) for kind in ("attn", "ffn")}
    lines = [
        f"{level} {kind}{f' ({len(numbers)}): layers {layer_ranges(numbers)}' if numbers else ''}"
        for (level, kind), numbers in sorted(layers.items(), key=_ladder_order)
    ]
    parts = [f"{kind} of layers {layer_ranges(nums)}" for kind, nums in removed.items() if nums]
    count = sum(map(len, removed.values()))
    return [*lines, f"Removed ({count}): {'; '.join(parts)}" if count else "Removed: nothing"]


def _ladder_order(entry: tuple[tuple[str, str], list[int]]) -> tuple[int, float, int]:
    """A key that sorts by kind, and levels from the most to the least exact one."""
    (name, kind), _ = entry
    place = ("attn", "ffn", "cache", EMBEDDINGS).index(kind)
    if kind != "cache":
        return place, 0, WEIGHT_LEVELS.index(name)
    level = CacheLevel.of(name)
    return place, -(level.window_tokens or math.inf), -level.bits


def rise_lines(answer: dict[str, Any]) -> list[str]:
    """A line for the rise in NLL of a plan, and a warning if it is large."""
    rise, source = answer["delta_nll"], answer["delta_nll_source"]
    known = "unknown" if rise is None else f"{rise:+.4f} nats/token"
    lines = [f"ΔNLL: {known} ({source})"]
    if rise is not None and rise > 1:
        lines.append("Warning: above 1 nat per token the model is hardly usable.")
    return lines
