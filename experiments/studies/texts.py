"""``python -m experiments.studies.texts``: how costs of levels and plans depend on the text.

Each kind of text is drawn with several seeds. The knapsack chooses plans from the one-shot costs
on each draw, and from their mean over kinds; all plans are measured on report text of each kind.
Plans by the kind of text of a prompt are measured on windows whose first tokens are the prompt.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.config.common import TextConfig, parse_pinned
from experiments.config.studies import TextsConfig
from experiments.contexts import build_context, ladder_bytes, load_text
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.tables import (
    ALL,
    CALIBRATION,
    RECORD_FILE,
    TextStudy,
    publish,
    save_figure,
)
from experiments.study.records import Record, RowFile, row_key
from experiments.study.run_folder import RunFolder, git_state
from rap_env.artifacts import atomic_write, digest
from rap_env.context.opening import require_live
from rap_env.importance.kind_costs import KindCosts, mean_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import scan_levels
from rap_env.importance.text_kinds import Shares, TextKinds
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.policies.by_text import TextPolicy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import ensure_disjoint
from rap_env.scoring.scorer import MaskScorer

COSTS_FILE, PLANS_FILE, PROMPTS_FILE = "costs.jsonl", "plans.jsonl", "prompts.jsonl"
FIGURE_FILE = "texts.png"
_FROZEN = ("model", "env.levels", "env.together", "texts.kinds")


class Draw(NamedTuple):
    """A calibration text: a kind (`ALL` for all of them), a seed, and the tokens of each kind."""

    kind: str
    seed: int
    tokens: int


@dataclass(frozen=True)
class CostRow(Record):
    """One-shot costs of all items on one draw; `costs` has the fields of `LevelCosts`."""

    record_name = "A row of costs"
    identity = ("kind", "seed", "tokens")

    kind: str
    seed: int
    tokens: int
    costs: dict[str, Any]


@dataclass(frozen=True)
class PlanRow(Record):
    """The knapsack's plan for one cell from the costs on one draw, measured on one text.

    Attributes:
        chosen_on: Kind of the draw, `seed` and `tokens` likewise.
        cell: The request and its budget in bytes, as in ``texts.cells``.
        judged_on: Kind of the report text; `CALIBRATION` for the text of the draw itself.
        levels: Levels of the items that are not native, by name.
        window_losses: ΔNLL of each window of the text, nats per token, (windows,).
    """

    record_name = "A row of a plan"
    identity = ("chosen_on", "seed", "tokens", "cell", "judged_on")

    chosen_on: str
    seed: int
    tokens: int
    cell: str
    judged_on: str
    levels: dict[str, str]
    window_losses: list[float]


@dataclass(frozen=True)
class PromptRow(Record):
    """Plans by the prompts' kinds of text for one cell, measured on one text.

    Attributes:
        known: Whether the kind of the text is among those that the policy knows.
        shares: Shares of the kinds that the policy knows in the prompt of each window.
        window_losses: ΔNLL of each window with the plan for its prompt, nats per token, (windows,).
        general_losses: The same with the plan for equal shares of those kinds.
    """

    record_name = "A row of plans by prompts"
    identity = ("seed", "cell", "judged_on", "known")

    seed: int
    cell: str
    judged_on: str
    known: bool
    shares: list[list[float]]
    window_losses: list[float]
    general_losses: list[float]


def texts(config: Config, folder: Path) -> Path:
    """Measure costs on every draw and their plans on every kind; existing rows are kept.

    Returns:
        The path of ``texts.json``, from which ``tables.md`` and the figure are made.

    Raises:
        ExperimentError: The settings lack something, or the folder has results of others.
        InfeasibleBudgetError: A budget is below what the lowest levels need.
        CorpusError: A text is too short, or a report text overlaps with a calibration text.
    """
    settings = config.texts
    if not config.env.lowers:
        raise ExperimentError("The study of texts measures levels of items; give env=ladder.")
    if len(settings.kinds) < 2 or {ALL, CALIBRATION} & set(settings.kinds) or not settings.cells:
        raise ExperimentError(
            f"texts needs a cell, and two kinds with names other than {ALL!r} and {CALIBRATION!r}; "
            f"got the kinds {list(settings.kinds)} and the cells {settings.cells}."
        )
    run, started = RunFolder(folder), time.monotonic()
    run.start(config, frozen=_FROZEN)
    record = TextMeasurements(config, folder).record()
    with atomic_write(folder / RECORD_FILE) as file:
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
    run.finish(started, draws=len(record["costs"]), rows=len(record["plans"]))
    found = TextStudy(record)
    publish(folder, found)
    if find_spec("matplotlib") is not None:  # an extra, and the tables say the same
        save_figure(found, folder / FIGURE_FILE)
    return folder / RECORD_FILE


def draws_of(settings: TextsConfig) -> dict[Draw, TextConfig]:
    """Return the calibration texts: each kind in one size, `sized` in several."""
    found = {}
    for name, kind in settings.kinds.items():
        sizes = {settings.tokens, *(settings.sizes_tokens if name == settings.sized else [])}
        for tokens in sorted(sizes):
            length = min(tokens, settings.window_tokens)
            for seed in settings.seeds:
                text = TextConfig(kind.source, tokens // length, length, seed, kind.field)
                found[Draw(name, seed, tokens)] = text
    return found


class TextMeasurements:
    """The draws, report texts and rows of one study."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._settings = config, config.texts
        self._contexts = {
            draw: require_live(build_context(replace(config, calibration=text), profiled=False))
            for draw, text in draws_of(config.texts).items()
        }
        context = next(iter(self._contexts.values()))
        self._llm, self._memory, self._store = context.llm, context.memory, context.store
        item_bytes = ladder_bytes(config, context)
        assert item_bytes is not None
        self._ladder, self._requests = item_bytes.ladder, {}
        for cell in self._settings.cells:
            pinned = parse_pinned(cell)
            self._requests[cell] = Request(*pinned.shape, pinned.budget_bytes)
            item_bytes.check_feasible(self._requests[cell])
        self._report = {}
        for name, kind in self._settings.kinds.items():
            windows, length = self._settings.report_windows, self._settings.window_tokens
            text = TextConfig(kind.source, windows, length, field=kind.field)
            self._report[name] = load_text(text, "report", self._llm, progress=config.progress)
            for draw in self._contexts.values():
                ensure_disjoint(draw.corpus, self._report[name])
        self._cost_rows = RowFile(folder / COSTS_FILE, CostRow)
        self._plan_rows = RowFile(folder / PLANS_FILE, PlanRow)
        self._prompt_rows = RowFile(folder / PROMPTS_FILE, PromptRow)
        self._costs: dict[Draw, LevelCosts] = {}
        self._git = git_state()

    def record(self) -> dict[str, Any]:
        """Measure what is missing, and return what the tables are made from, as JSON values."""
        self._costs, settings = self._measure_costs(), self._settings
        rows, prompts = self._measure_plans(self._costs), self._measure_prompts()
        fields = (*PlanRow.identity, "window_losses")
        of_prompts = (*PromptRow.identity, "shares", "window_losses", "general_losses")
        return {
            "model": {"name": self._llm.name, "fingerprint": self._llm.facts.fingerprint},
            "git": self._git,
            "ladder": self._ladder.spec,
            "kinds": {name: corpus.provenance for name, corpus in self._report.items()},
            "seeds": settings.seeds,
            "cells": settings.cells,
            "tokens": settings.tokens,
            "sized": settings.sized,
            "sizes_tokens": sorted(settings.sizes_tokens),
            "costs": [
                {
                    **draw._asdict(),
                    "text_sha256": found.provenance["text"]["sha256"],
                    "one_shot": found.one_shot,
                }
                for draw, found in self._costs.items()
            ],
            "plans": [{name: getattr(row, name) for name in fields} for row in rows],
            "prompt_tokens": settings.prompt_tokens,
            "prompts": [{name: getattr(row, name) for name in of_prompts} for row in prompts],
        }

    def _kind_costs(self, seed: int, without: str | None) -> KindCosts:
        """Return the costs by kind of text from the draws of a seed, with one kind left out."""
        kinds = [kind for kind in self._settings.kinds if kind != without]
        draws = {kind: Draw(kind, seed, self._settings.tokens) for kind in kinds}
        texts = {kind: self._contexts[draw].corpus.tokens.numpy() for kind, draw in draws.items()}
        costs = {kind: self._costs[draw] for kind, draw in draws.items()}
        return KindCosts(TextKinds.of(texts, self._llm.facts.vocab_size), costs)

    def _provenance(self, scorer: MaskScorer, **depends_on: Any) -> dict[str, Any]:
        known = {"scores": digest(dict(scorer.plan_context)), "ladder": self._ladder.spec}
        return {"depends_on": {**known, **depends_on}, "git": self._git}

    def _measure_costs(self) -> dict[Draw, LevelCosts]:
        """Return the one-shot costs on every draw.

        They are always measured: `LiveContext.level_costs` would return the packaged costs for
        every draw of text that the default model writes.
        """
        found = {}
        bar = progress_bar(self._config.progress, self._contexts.items(), desc="costs")
        for draw, context in bar:
            provenance = self._provenance(context.scorer)
            measure = partial(self._cost_row, draw, context.scorer, provenance)
            row = self._cost_rows.get(row_key(*draw, provenance), measure)
            found[draw] = LevelCosts(**row.costs)
            context.scorer.release()
        return found

    def _cost_row(self, draw: Draw, scorer: MaskScorer, provenance: dict[str, Any]) -> CostRow:
        levels, together = self._ladder.cache_levels, self._ladder.together
        costs = scan_levels(scorer, levels, together=together, progress=self._config.progress)
        return CostRow(*draw, asdict(costs), provenance=provenance)

    def _measure_plans(self, costs: Mapping[Draw, LevelCosts]) -> list[PlanRow]:
        """Return a row for each draw, cell, and text that the plan is judged on."""
        settings, chosen_on = self._settings, dict(costs)
        for seed in settings.seeds:
            parts = [costs[Draw(kind, seed, settings.tokens)] for kind in settings.kinds]
            chosen_on[Draw(ALL, seed, settings.tokens)] = mean_costs(parts)
        policies, rows = {draw: self._knapsack(found) for draw, found in chosen_on.items()}, []
        for name, corpus in progress_bar(self._config.progress, self._report.items(), desc="plans"):
            scorer = MaskScorer(self._llm, corpus, self._store)
            draws = [d for d in policies if d.tokens == settings.tokens or d.kind == name]
            rows += self._judge(name, scorer, {draw: policies[draw] for draw in draws})
        for draw, context in self._contexts.items():
            if draw.kind == settings.sized and draw.tokens in settings.sizes_tokens:
                rows += self._judge(CALIBRATION, context.scorer, {draw: policies[draw]})
        return rows

    def _knapsack(self, costs: LevelCosts) -> KnapsackPolicy:
        levels = {item.name: item.levels for item in self._ladder.items}
        return KnapsackPolicy(self._memory, costs, levels=levels)

    def _measure_prompts(self) -> list[PromptRow]:
        """Return a row for each text, seed and cell, with the text's own kind known and unknown."""
        rows: list[PromptRow] = []
        if not self._settings.prompt_tokens:
            return rows
        bar = progress_bar(self._config.progress, self._report.items(), desc="prompts")
        for name, corpus in bar:
            scorer = MaskScorer(self._llm, corpus, self._store)
            for seed, known in itertools.product(self._settings.seeds, (True, False)):
                costs = self._kind_costs(seed, without=None if known else name)
                rows += self._judge_prompts(name, seed, known, scorer, costs)
            scorer.release()
        return rows

    def _judge_prompts(
        self, name: str, seed: int, known: bool, scorer: MaskScorer, costs: KindCosts
    ) -> list[PromptRow]:
        """Return the rows of the plans by the prompts of one text."""
        policy = TextPolicy(costs, self._knapsack)
        prompts = scorer.corpus.tokens[:, : self._settings.prompt_tokens].tolist()
        shares = [policy.text_kinds.shares(prompt) for prompt in prompts]
        made_of = [[one.one_shot, one.errors, one.joint] for one in costs.costs.values()]
        provenance = self._provenance(scorer, costs=digest(made_of), shares=shares)
        rows = []
        for cell, request in self._requests.items():
            plans = [policy.for_text(one).choose(request) for one in shares]
            make = partial(
                _prompt_row, seed, cell, name, known, shares, scorer, plans,
                policy.choose(request), provenance,
            )  # fmt: skip
            key = row_key(seed, cell, name, known, provenance)
            rows.append(self._prompt_rows.get(key, make))
        return rows

    def _judge(
        self, name: str, scorer: MaskScorer, policies: Mapping[Draw, KnapsackPolicy]
    ) -> list[PlanRow]:
        """Return the rows of the policies' plans on one text."""
        rows = []
        for draw, policy in policies.items():
            costs = policy.costs
            known = digest([costs.one_shot, costs.errors, costs.joint])
            provenance = self._provenance(scorer, costs=known)
            plans = {cell: policy.choose(request) for cell, request in self._requests.items()}
            keys = {cell: row_key(*draw, cell, name, provenance) for cell in plans}
            if missing := [plans[c] for c, key in keys.items() if not self._plan_rows.has(key)]:
                scorer.nll_many([Plan(), *missing])  # steps that plans share run once
            for cell, plan in plans.items():
                row = partial(PlanRow, *draw, cell, name, plan.levels, provenance=provenance)
                rows.append(self._plan_rows.get(keys[cell], partial(_judged, scorer, plan, row)))
        scorer.release()
        return rows


def _judged(scorer: MaskScorer, plan: Plan, row: Callable[..., PlanRow]) -> PlanRow:
    return row(window_losses=_window_losses(scorer, plan).tolist())


def _window_losses(scorer: MaskScorer, plan: Plan) -> npt.NDArray[np.float64]:
    """ΔNLL of each window, nats per token, (windows,)."""
    return np.asarray(scorer.window_nll(plan) - scorer.window_nll(Plan()))


def losses_by_window(scorer: MaskScorer, plans: Sequence[Plan]) -> list[float]:
    """Return the ΔNLL of each window with a plan of its own, nats per token."""
    by_plan = {plan: _window_losses(scorer, plan) for plan in dict.fromkeys(plans)}
    return [float(by_plan[plan][window]) for window, plan in enumerate(plans)]


def _prompt_row(
    seed: int,
    cell: str,
    name: str,
    known: bool,
    shares: Sequence[Shares],
    scorer: MaskScorer,
    plans: Sequence[Plan],
    general: Plan,
    provenance: dict[str, Any],
) -> PromptRow:
    losses, of_general = losses_by_window(scorer, plans), _window_losses(scorer, general).tolist()
    kinds = [list(one) for one in shares]
    return PromptRow(seed, cell, name, known, kinds, losses, of_general, provenance=provenance)


if __name__ == "__main__":
    launch("texts", texts)
