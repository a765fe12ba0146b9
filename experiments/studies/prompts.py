"""``python -m experiments.studies.prompts``: policies that see the prompt, beside others.

The first tokens of each window of held-out text are the prompt of a request. Plans are chosen
for some requests and budgets, and measured on the whole window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.comparison.result_rows import RecordedPlans
from experiments.config import Config
from experiments.config.common import parse_pinned
from experiments.contexts import load_texts, reject_table
from experiments.launch import launch
from experiments.study.console import ExperimentError
from experiments.study.harness import Job, Published, Study
from experiments.study.json_records import Record
from experiments.study.statistics import bootstrap_mean, relative_ratio
from experiments.study.table_format import TitledTable, crossed_table, relative_words
from rap_env.artifacts import digest
from rap_env.context.opening import open_store
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import BY_TEXT, TextPolicy
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.scorer import PlanScorer
from rap_env.scoring.store import with_levels

BLIND = ", blind"
"""End of the name of a policy by text that chooses without the prompt, for equal shares."""

CAPTION = (
    "ΔNLL (nats/token) on held-out text, mean over {cells} requests and budgets, with a 95 % "
    "interval over windows. Policies by text see the first {tokens} tokens of each window; blind, "
    "they choose for equal shares of the kinds that they know."
)
RELATIVE = (
    "ΔNLL of one policy divided by that of another one, minus 1: geometric mean over requests and "
    "budgets, in the first column over texts too, with a 95 % interval over windows."
)


@dataclass(frozen=True)
class PolicyRow(Record):
    """A policy's plans for one request and budget, on the windows of one text.

    Attributes:
        cell: The request and its budget in bytes, as in ``prompts.cells``.
        prompt_tokens: First tokens of each window that are its prompt.
        recorded: Whether the plans are those of an earlier evaluation.
        window_delta_nll: ΔNLL of each window, nats per token, (windows,).
    """

    file = "prompts.jsonl"
    record_name = "A row of a policy"
    identity = ("policy", "text", "cell")

    policy: str
    text: str
    cell: str
    prompt_tokens: int
    recorded: bool
    window_delta_nll: list[float]


def prompt_jobs(config: Config, folder: Path) -> Iterator[Job[PolicyRow]]:
    """Yield the plans of all policies on all texts.

    Raises:
        ExperimentError: There is no text or no cell.
        RapError: As for `load_policy`; or a text is not available or too short.
    """
    settings, model = config.prompts, config.model
    if not (settings.texts and settings.cells):
        raise ExperimentError("prompts needs texts and cells; give experiment=prompts.")
    reject_table(config)
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    policies = {name: load_policy(name, llm) for name in settings.policies}
    for name, policy in list(policies.items()):
        if isinstance(policy, TextPolicy):
            policies[f"{name}{BLIND}"] = policy.for_text(())
    for name, path in settings.recorded.items():
        policies[name] = RecordedPlans(name, path, llm.facts.fingerprint)
    texts = load_texts(settings.texts, "report", llm, progress=config.progress)
    store = open_store(config.store)
    scorers = {name: PlanScorer(llm, text, store) for name, text in texts.items()}

    def measure(name: str, text: str, cell: str, plans: Sequence[Plan]) -> PolicyRow:
        scorer = scorers[text]
        delta_nll = {plan: scorer.window_nll(plan) - scorer.window_nll(Plan()) for plan in plans}
        own = [float(delta_nll[plan][window]) for window, plan in enumerate(plans)]
        recorded = name in settings.recorded
        return PolicyRow(name, text, cell, settings.prompt_tokens, recorded, own)

    for text, name, cell in product(texts, policies, settings.cells):
        pinned, scorer = parse_pinned(cell), scorers[text]
        request = Request(*pinned.shape, pinned.budget_bytes)
        starts = texts[text].tokens[:, : settings.prompt_tokens].tolist()
        plans = [seeing(policies[name], start).choose(request) for start in starts]
        hashed = digest([plan.levels for plan in plans])
        depends_on = {**with_levels(scorer.context), "plans": hashed}
        make, identity = partial(measure, name, text, cell, plans), (name, text, cell)
        needed = [Plan(), *plans]
        yield Job(PolicyRow, identity, depends_on, make, scorer=scorer, plans=needed)


def seeing(policy: Policy, prompt: Sequence[int]) -> Policy:
    """The policy for a prompt; itself if it does not look at prompts."""
    if not isinstance(policy, TextPolicy):
        return policy
    return policy.for_text(policy.text_kinds.shares(prompt))


def prompt_tables(rows: Sequence[PolicyRow]) -> list[TitledTable]:
    """ΔNLL of the policies, and relative to each other."""
    policies, texts, cells = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in PolicyRow.identity
    )
    windows = {(row.policy, row.text, row.cell): row.window_delta_nll for row in rows}

    def losses(policy: str, text: str) -> npt.NDArray[np.float64]:
        """ΔNLL, nats per token, (cells, windows)."""
        return np.array([windows[policy, text, cell] for cell in cells])

    def on_text(policy: str, text: str | None) -> str:
        if text is None:
            return f"{np.mean([losses(policy, text) for text in texts]):.3f}"
        return str(bootstrap_mean(losses(policy, text).mean(axis=0)))

    def relative(pair: tuple[str, str], of_texts: Sequence[str]) -> str:
        own, rival = (np.concatenate([losses(name, text) for text in of_texts]) for name in pair)
        return relative_words(relative_ratio(list(own), list(rival)))

    recorded = list(dict.fromkeys(row.policy for row in rows if row.recorded))
    pairs = {f"{own} / {rival}": (own, rival) for own, rival in compared(policies, recorded)}
    caption = CAPTION.format(cells=len(cells), tokens=rows[0].prompt_tokens)
    columns = {"Mean": None, **{text: text for text in texts}}
    loss_table = crossed_table("Policy", {name: name for name in policies}, columns, on_text)
    columns = {"All": texts, **{text: [text] for text in texts}}
    relative_table = crossed_table("Policies", pairs, columns, relative)
    return [
        TitledTable(loss_table, "Policies on held-out text", caption),
        TitledTable(relative_table, "Relative", RELATIVE),
    ]


def compared(policies: Sequence[str], recorded: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each pair of policies of which the first is shown relative to the second.

    All are compared with the first policy and those that see the prompt with recorded plans;
    policies by text also with each other, without the text, and with the blind ones.
    """
    first, *others = policies
    yield from ((policy, first) for policy in others if policy not in recorded)
    for rival, policy in product(recorded, policies):
        if policy not in recorded and not policy.endswith(BLIND):
            yield policy, rival
    by_text = [policy for policy in policies if policy.endswith(BY_TEXT)]
    yield from ((policy, rival) for rival, policy in combinations(by_text, 2))
    for policy in others:
        for rival in (policy.removesuffix(BY_TEXT), f"{policy}{BLIND}"):
            if rival != policy and rival in others:
                yield policy, rival


STUDY = Study(
    "prompts",
    "Policies that see the prompt",
    [PolicyRow],
    prompt_jobs,
    prompt_tables,
    frozen=("model", "prompts.texts", "prompts.prompt_tokens"),
    published=[Published("prompts", "prompts")],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
