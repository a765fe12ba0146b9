"""``python -m experiments.soak.newcomers``: what a long prompt does to the streams beside it.

Groups of requests are generated twice, without and with a newcomer whose prompt is long, in the
memory of the settings; ``soak.requests`` is the number of streams that are compared. The exit
status is 1 if the newcomer raises the predicted rise in NLL of a stream by more than
``serve.max_degradation_by_newcomer``.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.comparison.run_folder import provenance
from experiments.config import Config
from experiments.config.serving import SoakConfig
from experiments.contexts import server_settings
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.soak.recording import plain_token_ids, publish
from rap_env.runtime.engine import Engine
from rap_env.runtime.plan_chooser import predicts
from rap_env.runtime.request_handle import RequestHandle
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.stack import ServerStack, build_stack

RECORD_FILE = "newcomers.jsonl"


def newcomers(config: Config, folder: Path) -> None:
    """Generate the answers, write the record and print its summary.

    Raises:
        RapError: The model cannot be loaded, its budget is too small, or the policy predicts
            nothing.
        SystemExit: A stream was degraded by more than the limit.
    """
    stack = build_stack(server_settings(config, folder))
    record = compare_streams(stack, config.soak, config.seed)
    stack.close()
    path = Path(config.soak.out) if config.soak.out else folder / RECORD_FILE
    publish(path, {**record, "provenance": provenance({"run": config.seed})}, summary(record))
    if record["above_limit"]:
        sys.exit(1)


def compare_streams(stack: ServerStack, soak: SoakConfig, seed: int) -> dict[str, Any]:
    """Generate streams without and with a newcomer, and compare the rises in NLL of their plans.

    Raises:
        ExperimentError: The policy predicts no rise in NLL, or a stream was not answered.
    """
    engine, settings = stack.engine, stack.settings
    chooser = engine.controller.chooser
    if not predicts(chooser.policy):
        raise ExperimentError(
            f"serve.policy={chooser.policy.name} predicts no rise in NLL; choose knapsack or rap."
        )
    draw = random.Random(seed)
    token_ids = plain_token_ids(engine.llm)
    pairs: list[tuple[RequestHandle, RequestHandle]] = []
    late: list[RequestHandle] = []
    engine.warm_up()
    while len(pairs) < soak.requests:
        count = min(settings.max_batch_size - 1, soak.requests - len(pairs))
        prompts = [draw.choices(token_ids, k=soak.prompt_tokens) for _ in range(count)]
        newcomer = draw.choices(token_ids, k=soak.newcomer_tokens)
        alone, beside = (
            run_group(engine, prompts, soak.answer_tokens, other) for other in ([], newcomer)
        )
        late.append(beside.pop())
        pairs += zip(alone, beside, strict=True)

    def worst(handle: RequestHandle) -> float:
        rises = [chooser.rise(plan, handle.final_tokens) for plan in handle.plans]
        return max((rise for rise in rises if rise is not None), default=0.0)

    added = [worst(beside) - worst(alone) for alone, beside in pairs]
    limit = engine.controller.max_degradation_by_newcomer
    others = [one.plans != two.plans for one, two in pairs]
    changed = [one.token_ids != two.token_ids for one, two in pairs]
    return {
        "model": engine.llm.name,
        "budget_bytes": engine.controller.monitor.budget_bytes,
        "limit": limit,
        "streams": len(pairs),
        "above_limit": 0 if limit is None else sum(rise > limit + 1e-9 for rise in added),
        "other_plans": sum(others),
        "other_tokens": sum(changed),
        "other_tokens_under_equal_plans": sum(
            change and not other for change, other in zip(changed, others, strict=True)
        ),
        "max_delta_nll_alone": max(worst(alone) for alone, _ in pairs),
        "max_added_delta_nll": max(added),
        "newcomers": len(late),
        "newcomers_served": sum(handle.reason == "length" for handle in late),
    }


def run_group(
    engine: Engine, prompts: Sequence[Sequence[int]], new: int, newcomer: Sequence[int]
) -> list[RequestHandle]:
    """Generate answers to prompts, and to a newcomer's once all of the others are running."""
    params = SamplingParams(max_new_tokens=new)
    handles = [engine.submit(prompt, params) for prompt in prompts]
    if newcomer:
        _run_until(engine, lambda: all(handle.token_ids or handle.done for handle in handles))
        handles.append(engine.submit(newcomer, params))
    _run_until(engine, lambda: all(handle.done for handle in handles))
    for handle in handles[: len(prompts)]:
        if handle.reason != "length":
            raise ExperimentError(f"A stream was not answered; give more memory: {handle.error}")
    return handles


def _run_until(engine: Engine, reached: Callable[[], bool]) -> None:
    while not reached():
        if not engine.step():
            time.sleep(0.01)


def summary(record: dict[str, Any]) -> str:
    """Summarize a record in a few lines of text."""
    return "\n".join(
        [
            f"{record['above_limit']} of {record['streams']} streams beside a long prompt had a "
            f"plan whose predicted rise is more than {record['limit']} nats per token above that "
            "without it;",
            f"the most that was added is {record['max_added_delta_nll']:.4f}, to "
            f"{record['max_delta_nll_alone']:.4f} at most without the long prompt.",
            f"{record['other_plans']} had other plans, {record['other_tokens']} other tokens "
            f"({record['other_tokens_under_equal_plans']} of them under equal plans, by rounding).",
            f"{record['newcomers_served']} of {record['newcomers']} long prompts were answered.",
        ]
    )


if __name__ == "__main__":
    launch("soak", newcomers)
