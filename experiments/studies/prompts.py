"""``python -m experiments.studies.prompts``: policies that see the prompt, beside others.

The first tokens of each window of held-out text are the prompt of a request. Plans are chosen for
some requests and budgets, and measured on the whole window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.comparison.result_rows import RecordedPlans
from experiments.config import Config
from experiments.config.common import parse_pinned
from experiments.contexts import load_texts, reject_table
from experiments.launch import launch
from experiments.study.experiment_errors import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.json_records import Record
from experiments.study.pages import Published
from experiments.study.statistics import Estimate, bootstrap_mean, relative_ratio
from experiments.study.table_format import Table, TitledTable, crossed_table, relative_words
from rap_env.artifacts import digest
from rap_env.context.opening import open_store
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.by_text import BY_TEXT, TextPolicy
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
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
    from rap_env.models.files.loading import load_llm

    settings, model = config.prompts, config.model
    if not (settings.texts and settings.cells):
        raise ExperimentError(
            "prompts needs texts and cells; give experiment=prompts, or set prompts.texts and "
            "prompts.cells."
        )
    reject_table(config)
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    policies: dict[str, Policy] = {name: load_policy(name, llm) for name in settings.policies}
    by_text = {name: own for name, own in policies.items() if isinstance(own, TextPolicy)}
    policies |= {f"{name}{BLIND}": own.for_text(()) for name, own in by_text.items()}
    for name, path in settings.recorded.items():
        policies[name] = RecordedPlans(name, path, llm.facts.fingerprint)
    texts = load_texts(settings.texts, "report", llm, progress=config.progress)
    store = open_store(config.store)
    for text, corpus in texts.items():
        scorer = MaskScorer(llm, corpus, store)
        starts = corpus.tokens[:, : settings.prompt_tokens].tolist()
        for (name, policy), cell in itertools.product(policies.items(), settings.cells):
            pinned = parse_pinned(cell)
            request = Request(*pinned.shape, pinned.budget_bytes)
            plans = [_seeing(policy, start).choose(request) for start in starts]
            hashed = digest([plan.levels for plan in plans])
            yield Job(
                PolicyRow,
                (name, text, cell),
                {**with_levels(scorer.context), "plans": hashed},
                partial(
                    _row, scorer, plans, (name, text, cell), settings.prompt_tokens,
                    name in settings.recorded,
                ),
                scorer=scorer,
                plans=[Plan(), *plans],
            )  # fmt: skip


def _seeing(policy: Policy, prompt: Sequence[int]) -> Policy:
    """The policy for a prompt; itself if it does not look at prompts."""
    if not isinstance(policy, TextPolicy):
        return policy
    return policy.for_text(policy.text_kinds.shares(prompt))


def _row(
    scorer: MaskScorer,
    plans: Sequence[Plan],
    names: tuple[str, str, str],
    prompt_tokens: int,
    recorded: bool,
) -> PolicyRow:
    """The row of a policy, whose plan of each window is measured on it."""
    native = scorer.window_nll(Plan())
    by_plan = {plan: scorer.window_nll(plan) - native for plan in dict.fromkeys(plans)}
    delta_nll = [float(by_plan[plan][window]) for window, plan in enumerate(plans)]
    return PolicyRow(*names, prompt_tokens, recorded, delta_nll)


class PromptStudy:
    """The rows of a study of prompts, by policy, text and cell."""

    def __init__(self, rows: Sequence[PolicyRow]) -> None:
        self._rows = {(row.policy, row.text, row.cell): row for row in rows}
        self.policies, self.texts, self.cells = (
            list(dict.fromkeys(key[part] for key in self._rows)) for part in range(3)
        )
        self.prompt_tokens = rows[0].prompt_tokens if rows else 0
        self._rivals = list(dict.fromkeys(row.policy for row in rows if row.recorded))

    def losses(self, policy: str, text: str, cells: Sequence[str]) -> npt.NDArray[np.float64]:
        """ΔNLL of each window, mean over some cells, nats per token, (windows,)."""
        rows = [self._rows[policy, text, cell] for cell in cells]
        return np.asarray(np.mean([row.window_delta_nll for row in rows], axis=0))

    def relative(self, policy: str, rival: str, texts: Sequence[str]) -> Estimate | None:
        """ΔNLL of a policy divided by that of another one, minus 1, over some texts."""
        pairs = [(text, cell) for text in texts for cell in self.cells]
        return relative_ratio(
            [self.losses(policy, text, [cell]) for text, cell in pairs],
            [self.losses(rival, text, [cell]) for text, cell in pairs],
        )

    def loss_table(self) -> Table:
        """Table of ΔNLL by policy and text."""
        rows = []
        for policy in self.policies:
            losses = [self.losses(policy, text, self.cells) for text in self.texts]
            shown = (str(bootstrap_mean(values)) for values in losses)
            rows.append([policy, f"{np.mean(losses):.3f}", *shown])
        return ["Policy", "Mean", *self.texts], rows

    def relative_table(self) -> Table:
        """Table of ΔNLL relative to the first policy; policies by text also among themselves."""
        first, *others = self.policies
        pairs = [(policy, first) for policy in others if policy not in self._rivals]
        seeing = [policy for policy in self.policies if not policy.endswith(BLIND)]
        pairs += [(p, rival) for rival in self._rivals for p in seeing if p not in self._rivals]
        by_text = [policy for policy in self.policies if policy.endswith(BY_TEXT)]
        pairs += [(policy, rival) for rival, policy in itertools.combinations(by_text, 2)]
        pairs += [
            (policy, rival)
            for policy in others
            for rival in (policy.removesuffix(BY_TEXT), f"{policy}{BLIND}")
            if rival != policy and rival in others
        ]

        def shown(pair: tuple[str, str], texts: Sequence[str]) -> str:
            return relative_words(self.relative(*pair, texts))

        lines = {f"{policy} / {rival}": (policy, rival) for policy, rival in pairs}
        columns = {"All": self.texts, **{text: [text] for text in self.texts}}
        return crossed_table("Policies", lines, columns, shown)


def prompt_tables(study: PromptStudy) -> list[TitledTable]:
    """ΔNLL of the policies, and relative to each other."""
    caption = CAPTION.format(cells=len(study.cells), tokens=study.prompt_tokens)
    return [
        TitledTable(study.loss_table(), "Policies on held-out text", caption),
        TitledTable(study.relative_table(), "Relative", RELATIVE),
    ]


STUDY = Study(
    "prompts",
    "Policies that see the prompt",
    [PolicyRow],
    prompt_jobs,
    prompt_tables,
    data=PromptStudy,
    frozen=("model", "prompts.texts", "prompts.prompt_tokens"),
    published=[Published("prompts", "prompts")],
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
