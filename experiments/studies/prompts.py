"""``python -m experiments.studies.prompts``: policies that see the prompt, beside others.

The first tokens of each window of held-out text are the prompt of a request. Plans are chosen for
some requests and budgets, and measured on the whole window.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.comparison.recorded import RecordedPlans
from experiments.config import Config
from experiments.config.common import parse_pinned
from experiments.contexts import load_texts, reject_table
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.texts import losses_by_window
from experiments.study.records import Record, RowFile, row_key
from experiments.study.run_folder import RunFolder, git_state
from experiments.study.statistics import Estimate, bootstrap_mean, relative_ratio
from experiments.study.tables import (
    Table,
    TitledTable,
    document,
    publish_tables,
    relative_words,
    terminal,
)
from rap_env.artifacts import digest
from rap_env.context.opening import open_store
from rap_env.importance.text_kinds import Shares
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.by_text import BY_TEXT, TextPolicy
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer, bar_callback

ROWS_FILE = "prompts.jsonl"
BLIND = ", blind"
"""End of the name of a policy by text that chooses without the prompt, for equal shares."""

_FROZEN = ("model", "prompts.texts", "prompts.prompt_tokens")

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
        shares: Shares of the policy's kinds in the prompt of each window; empty ones for none.
        plans: Hash of the plan of each window.
        window_losses: ΔNLL of each window, nats per token, (windows,).
    """

    record_name = "A row of a policy"
    identity = ("policy", "text", "cell")

    policy: str
    text: str
    cell: str
    shares: list[list[float]]
    plans: list[str]
    window_losses: list[float]


def prompts(config: Config, folder: Path) -> Path:
    """Measure the plans of all policies on all texts; existing rows are kept.

    Returns:
        The path of ``prompts.jsonl``.

    Raises:
        ExperimentError: There is no text or no cell, or the folder has results of others.
        RapError: As for `load_policy`; or a text is not available or too short.
    """
    from rap_env.models.files.loading import load_llm

    settings, started = config.prompts, time.monotonic()
    if not (settings.texts and settings.cells):
        raise ExperimentError(
            "prompts needs texts and cells; give experiment=prompts, or set prompts.texts and "
            "prompts.cells."
        )
    reject_table(config)
    run = RunFolder(folder)
    run.start(config, frozen=_FROZEN)
    model = config.model
    llm = load_llm(model.name, device=model.device, dtype=model.dtype, weights=model.weights)
    policies: dict[str, Policy] = {name: load_policy(name, llm) for name in settings.policies}
    by_text = {name: one for name, one in policies.items() if isinstance(one, TextPolicy)}
    policies |= {f"{name}{BLIND}": one.for_text(()) for name, one in by_text.items()}
    for name, path in settings.recorded.items():
        policies[name] = RecordedPlans(name, path, llm.facts.fingerprint)
    requests = {}
    for cell in settings.cells:
        pinned = parse_pinned(cell)
        requests[cell] = Request(*pinned.shape, pinned.budget_bytes)
    store, git = open_store(config.store), git_state()
    texts = load_texts(settings.texts, "report", llm, progress=config.progress)
    rows, found = RowFile(folder / ROWS_FILE, PolicyRow), []
    for text, corpus in progress_bar(config.progress, texts.items(), desc="texts"):
        scorer = MaskScorer(llm, corpus, store)
        starts = corpus.tokens[:, : settings.prompt_tokens].tolist()
        wanted, missing = {}, [Plan()]
        for (name, policy), (cell, request) in itertools.product(
            policies.items(), requests.items()
        ):
            shares = _shares(policy, starts)
            plans = [policy.for_text(one).choose(request) for one in shares]
            known = {"plans": digest([plan.levels for plan in plans])}
            provenance = {"depends_on": {**scorer.plan_context, **known}, "git": git}
            key = row_key(name, text, cell, provenance)
            if not rows.has(key):
                missing += plans
            wanted[key] = partial(_measured, scorer, plans, (name, text, cell), shares, provenance)
        if len(missing) > 1:
            _measure(scorer, missing, progress=config.progress)
        found += [rows.get(key, make) for key, make in wanted.items()]
        scorer.release()
    study = PromptStudy(found, settings.prompt_tokens, list(settings.recorded))
    publish_tables(folder, study.markdown, terminal(study.document()))
    run.finish(started, rows=len(found))
    return folder / ROWS_FILE


def _shares(policy: Policy, starts: Sequence[Sequence[int]]) -> list[Shares]:
    """Return the kinds of text that a policy sees in prompts; empty ones if it sees none."""
    if not isinstance(policy, TextPolicy):
        return [()] * len(starts)
    return [policy.text_kinds.shares(start) for start in starts]


def _measure(scorer: MaskScorer, plans: Sequence[Plan], *, progress: bool) -> None:
    """Measure plans together, since steps that they share run once."""
    count = len(set(plans))
    with progress_bar(progress, total=count, desc="plans", unit="plan") as bar:
        scorer.nll_many(plans, bar_callback(bar))


def _measured(
    scorer: MaskScorer,
    plans: Sequence[Plan],
    names: tuple[str, str, str],
    shares: Sequence[Shares],
    provenance: dict[str, Any],
) -> PolicyRow:
    hashes, losses = [plan.digest for plan in plans], losses_by_window(scorer, plans)
    kinds = [list(one) for one in shares]
    return PolicyRow(*names, kinds, hashes, losses, provenance=provenance)


class PromptStudy:
    """The rows of a study of prompts.

    Args:
        rows: The rows.
        prompt_tokens: Tokens of a prompt.
        rivals: Policies that all others are compared with too.
    """

    def __init__(
        self, rows: Sequence[PolicyRow], prompt_tokens: int, rivals: Sequence[str] = ()
    ) -> None:
        self._rivals = rivals
        self._rows = {(row.policy, row.text, row.cell): row for row in rows}
        self._tokens = prompt_tokens
        self.policies, self.texts, self.cells = (
            list(dict.fromkeys(key[part] for key in self._rows)) for part in range(3)
        )

    def losses(self, policy: str, text: str, cells: Sequence[str]) -> npt.NDArray[np.float64]:
        """ΔNLL of each window, mean over some cells, nats per token, (windows,)."""
        rows = [self._rows[policy, text, cell] for cell in cells]
        return np.asarray(np.mean([row.window_losses for row in rows], axis=0))

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
            shown = (str(bootstrap_mean(one)) for one in losses)
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
        rows = [
            [
                f"{policy} / {rival}",
                relative_words(self.relative(policy, rival, self.texts)),
                *(relative_words(self.relative(policy, rival, [text])) for text in self.texts),
            ]
            for policy, rival in pairs
        ]
        return ["Policies", "All", *self.texts], rows

    def document(self) -> list[TitledTable]:
        """All tables."""
        caption = CAPTION.format(cells=len(self.cells), tokens=self._tokens)
        return [
            TitledTable(self.loss_table(), "Policies on held-out text", caption),
            TitledTable(self.relative_table(), "Relative", RELATIVE),
        ]

    @property
    def markdown(self) -> str:
        """All tables with captions in Markdown, below a title."""
        return f"# Policies that see the prompt\n\n{document(self.document(), captions=True)}"


if __name__ == "__main__":
    launch("prompts", prompts)
