"""Commands that write a plan for other engines: ``rap export`` and ``rap prune``.

Modules that load torch are imported once they are needed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rap_env.command_options import (
    facts_of,
    json_option,
    level_lines,
    request_options,
    rise_lines,
    show,
)
from rap_env.export.plan_options import PlanOptions

_remove_option = click.option(
    "--remove", multiple=True, metavar="BLOCKS", help="Such as layer03.ffn,layer07.attn."
)

_policy_option = click.option(
    "--policy",
    help="The policy that chooses for a request. [default: rap-v0; for gguf, a rule with one level "
    "for all caches and one for all weights]",
)
_request_options = request_options(
    required=False, policy=_policy_option, weights=None, dtype="bfloat16"
)


@click.command(short_help="Write a model for another engine.")
@click.argument("out", type=Path)
@click.option(
    "--to",
    "target",
    type=click.Choice(["hf", "vllm", "gguf"]),
    required=True,
    help="hf: a transformers folder; vllm: one for vLLM too; gguf: a file for llama.cpp.",
)
@click.option("--plan", "plan_file", type=Path, metavar="FILE", help="As rap choose --json writes.")
@_remove_option
@_request_options
@click.option(
    "--measure", metavar="TEXT", help="Measure the rise in NLL on a text file, or on text of self."
)
@json_option
@click.pass_obj
def export(
    command: str | None,
    out: Path,
    target: str,
    plan_file: Path | None,
    remove: Sequence[str],
    batch: int | None,
    seq: int | None,
    budget: str | None,
    policy: str | None,
    model: str,
    device: str,
    dtype: str,
    measure: str | None,
    as_json: bool,
) -> None:
    """Write a model under a plan to OUT, for another engine, with a model card.

    Give the plan in a file (--plan), or the blocks to remove (--remove), or a request
    (--batch, --seq, --budget) for which a policy chooses.
    """
    options = PlanOptions.of(remove, plan_file, (batch, seq, budget), policy)
    _unwind_when_terminated()
    from rap_env.export.writers import Export, exportable, write_folder, write_gguf
    from rap_env.models.files.loading import load_llm
    from rap_env.models.files.sources import gguf_source

    source = gguf_source(model)
    order = Export(options, out, command or "rap export", measure, source)
    file = exportable(model, source) if target == "gguf" else None
    llm = None
    if target != "gguf" or measure is not None:
        weights = "native" if target == "gguf" else "bf16"
        llm = load_llm(model, device=device, dtype=dtype, weights=weights, quick_levels=True)
    if file is not None:
        facts = facts_of(model, device, dtype, "native") if llm is None else llm.facts
        answer = write_gguf(file, facts, order, llm)
    else:
        assert llm is not None
        answer = write_folder(llm, order, for_vllm=target == "vllm")
    _show_written(answer, as_json)


@click.command(short_help="Save a smaller checkpoint.")
@click.argument("folder", type=Path)
@_remove_option
@_request_options
@json_option
@click.pass_context
def prune(context: click.Context, /, folder: Path, **options: Any) -> None:
    """Save a smaller checkpoint to FOLDER: `rap export --to hf` without its further options.

    Name the blocks (--remove), or a request (--batch, --seq, --budget) for which a policy
    chooses them. Load the checkpoint with rap_env.load_llm, or give its folder as --model.
    """
    context.invoke(export, out=folder, target="hf", **options)


def _unwind_when_terminated() -> None:
    """Let SIGTERM raise `SystemExit`, so that incomplete output is removed on the way out."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    click.get_current_context().call_on_close(lambda: signal.signal(signal.SIGTERM, before))


def _show_written(answer: dict[str, Any], as_json: bool) -> None:
    from rap_env.export.writers import type_lines

    lines = [
        *level_lines(answer["levels"]),
        *type_lines(answer.get("written", {})),
        f"Weights of {answer['model']} ({answer['dtype']}): {answer['weights']}; saved in "
        f"{answer['out']}",
        *rise_lines(answer),
    ]
    if answer["measured_delta_nll"] is not None:
        lines.append(f"ΔNLL, measured: {answer['measured_delta_nll']:+.4f} nats/token")
    show(answer, "\n".join(lines), as_json)
