"""``python -m experiments.demo``: what the project does, on the default model, in five minutes.

What the package holds of the model (costs of levels, measured plans, a text) is used and not
made again; every loss that the demo reports is measured on the model in this run. Finished
stages are not repeated, so the same command resumes after a kill.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from agents.export import export_policy
from experiments import live
from experiments.comparison.result_rows import ResultRow
from experiments.comparison.result_tables import summary_table
from experiments.comparison.summaries import Comparison, compare_pair
from experiments.config import Config
from experiments.contexts import build_context, context_config
from experiments.evaluate import evaluate
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.plotting import look, save_png
from experiments.study.run_folder import RunFolder
from experiments.study.table_format import percent, plain, seconds, wrapped
from experiments.train import train
from rap_env.context.opening import open_context
from rap_env.context.table import TableContext
from rap_env.policies.loading import load_policy

RUN, POLICY_FILE = "rap-s0", "rap.safetensors"


def demo(config: Config, folder: Path) -> Path:
    """Run the four stages.

    Returns:
        The folder with all records.
    """
    started = time.monotonic()

    def stage(number: int, text: str) -> None:
        say(f"\n[{number}/4] {text}  ({time.monotonic() - started:.0f} s)")

    on_table = replace(config.model, name=config.demo.table, device="auto", dtype="auto")
    training = replace(config, stage="train", model=on_table, store=None)
    model, scores = build_context(config), packaged_scores(training)

    stage(
        1,
        "A small network learns to choose what a language model stores in fewer bits, from "
        f"{len(scores.table.scores):,} choices that were tried before.",
    )
    run = train(training, config.stage_dir("train") / RUN)
    policy_file = run / POLICY_FILE
    export_policy(run, scores).save(policy_file)
    facts = RunFolder(run).read() or {}
    say(
        f"  It imitates a search, then learns by PPO: {seconds(facts['training_s'])}, {policy_file}"
    )

    text = config.evaluate.text
    words = f"{text.windows} x {text.window_tokens} tokens of Python's manual"
    stage(
        2,
        "The model runs with its choices and with those of other methods within the same memory, "
        f"on {words} that none has seen.",
    )
    if not Path(text.source).exists():  # the manual that is a part of every Python
        Path(text.source).write_text("\n\n".join(topics.values()), encoding="utf-8")
    results = evaluate(config, config.stage_dir("evaluate"), scores)

    stage(
        3,
        f"The model answers questions for {config.demo.live_s} s while its memory limit falls and "
        "returns.",
    )
    policy, live_folder = load_policy(policy_file, model.llm), config.stage_dir("live")
    recording = live.record(live_folder, model.llm, policy, config.demo)
    save_png(live.live_figure(recording), live_folder / "live.png")
    say(wrapped(recording.summary))

    stage(4, "What each method loses: how much less probable the text becomes (less is better).")
    comparison = Comparison(ResultRow.read(results))
    say(plain(summary_table(comparison)))
    say(wrapped(verdict(comparison)))
    say(f"\nAll tables, with figures in {folder / 'figures'}:")
    say(f"  python -m experiments.compare runs={folder} figures={folder / 'figures'}")
    say(f"\nNext:\n  rap choose --policy {policy_file} --batch 8 --seq 2048 --budget 128MiB")
    say(f"  rap serve --policy {policy_file} --memory 600MiB")
    say("  rap prepare smollm2-135m  # weights of 3 and 2 bits, with which budgets cost less")
    return folder


def verdict(comparison: Comparison) -> str:
    """Return in words how the policy compares with the other methods."""
    policy = next(method for method in comparison.methods if method.startswith("rap"))
    words = []
    for other in comparison.methods:
        pair = compare_pair(comparison, policy, other)
        if other in (policy, "dense") or pair is None or pair.relative is None:
            continue
        change = pair.relative
        how = f"{percent(abs(change.mean), 0)} {'less' if change.mean < 0 else 'more'} than"
        if change.low < 0 < change.high:
            how = "about as much as"
        words.append(f"{how} {look(other).label}")
    return f"Verdict: the policy loses {', '.join(words)}."


def packaged_scores(config: Config) -> TableContext:
    """Return the score table by which methods choose; reading a score takes no time."""
    context = open_context(context_config(config))
    assert isinstance(context, TableContext)  # `demo.table` is the name of one
    table = replace(context.table, evaluation_s=0.0)
    return TableContext(table, context.name, importance=context.importance)


if __name__ == "__main__":
    launch("demo", demo)
