"""``python -m experiments.studies.texts``: how costs of levels and plans depend on the text.

Each kind of text is drawn with several seeds. The knapsack chooses plans from the one-shot costs
on each draw, and from their mean over kinds; all plans are measured on report text of each kind.
Plans by the kind of text of a prompt are measured on windows whose first tokens are the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.config.common import TextConfig, parse_pinned
from experiments.config.studies import TextsConfig
from experiments.contexts import build_context, ladder_bytes, load_text
from experiments.errors import ExperimentError
from experiments.launch import launch
from experiments.studies.rows import ALL, CALIBRATION, CostRow, Draw, PlanRow, PromptRow
from experiments.studies.tables import TextStudy, chosen_and_judged, text_tables
from experiments.study.harness import Job, Study, measured
from rap_env.artifacts import digest
from rap_env.context.live import LiveContext
from rap_env.context.opening import require_live
from rap_env.importance.kind_costs import KindCosts, mean_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.level_scan import scan_levels
from rap_env.importance.text_kinds import TextKinds
from rap_env.plan import Plan
from rap_env.policies.by_text import TextPolicy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import ensure_disjoint
from rap_env.scoring.scorer import MaskScorer


def text_jobs(config: Config, folder: Path) -> Iterator[Job[Any]]:
    """Measure the costs on every draw, then yield them, their plans, and plans by prompts.

    Raises:
        ExperimentError: The settings lack something.
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
    study = TextJobs(config)
    cost_jobs = study.cost_jobs()
    rows = measured(cost_jobs, folder, "costs", config.progress)
    costs = {row.draw: LevelCosts(**row.costs) for row in rows}
    yield from cost_jobs
    yield from study.plan_jobs(costs)
    if settings.prompt_tokens:
        yield from study.prompt_jobs(costs)


def draws_of(settings: TextsConfig) -> dict[Draw, TextConfig]:
    """Return the calibration texts: each kind in one size, `sized` in several."""
    draws = {}
    for name, kind in settings.kinds.items():
        sizes = {settings.tokens, *(settings.sizes_tokens if name == settings.sized else [])}
        for tokens in sorted(sizes):
            length = min(tokens, settings.window_tokens)
            for seed in settings.seeds:
                text = TextConfig(kind.source, tokens // length, length, seed, kind.field)
                draws[Draw(name, seed, tokens)] = text
    return draws


class TextJobs:
    """The draws, report texts and jobs of one study."""

    def __init__(self, config: Config) -> None:
        self._progress, self._settings = config.progress, config.texts
        self._contexts: dict[Draw, LiveContext] = {
            draw: require_live(build_context(replace(config, calibration=text), profiled=False))
            for draw, text in draws_of(config.texts).items()
        }
        context = next(iter(self._contexts.values()))
        self._llm, self._memory = context.llm, context.memory
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
            corpus = load_text(text, "report", self._llm, progress=config.progress)
            for draw in self._contexts.values():
                ensure_disjoint(draw.corpus, corpus)
            self._report[name] = MaskScorer(self._llm, corpus, context.store)

    def cost_jobs(self) -> list[Job[CostRow]]:
        """The one-shot costs on every draw.

        They are always measured: `LiveContext.level_costs` would return the packaged costs for
        every draw of text that the default model writes.
        """
        return [
            Job(CostRow, draw, self._depends_on(own.scorer), partial(self._costs, draw, own.scorer))
            for draw, own in self._contexts.items()
        ]

    def plan_jobs(self, costs: Mapping[Draw, LevelCosts]) -> Iterator[Job[PlanRow]]:
        """The knapsack's plans from each draw, for each cell, and each text to judge them on."""
        settings, chosen_on = self._settings, dict(costs)
        for seed in settings.seeds:
            parts = [costs[Draw(kind, seed, settings.tokens)] for kind in settings.kinds]
            chosen_on[Draw(ALL, seed, settings.tokens)] = mean_costs(parts)
        policies = {draw: self._knapsack(own) for draw, own in chosen_on.items()}
        for name, scorer in self._report.items():
            for draw, policy in policies.items():
                if draw.tokens == settings.tokens or draw.kind == name:
                    yield from self._judged(draw, policy, name, scorer)
        for draw, context in self._contexts.items():
            if draw.kind == settings.sized and draw.tokens in settings.sizes_tokens:
                yield from self._judged(draw, policies[draw], CALIBRATION, context.scorer)

    def prompt_jobs(self, costs: Mapping[Draw, LevelCosts]) -> Iterator[Job[PromptRow]]:
        """Plans by prompts for each text, seed and cell, with the own kind known and unknown."""
        for name, scorer in self._report.items():
            for seed, known in itertools.product(self._settings.seeds, (True, False)):
                kinds = [kind for kind in self._settings.kinds if known or kind != name]
                draws = {kind: Draw(kind, seed, self._settings.tokens) for kind in kinds}
                texts = {k: self._contexts[d].corpus.tokens.numpy() for k, d in draws.items()}
                by_kind = KindCosts(
                    TextKinds.of(texts, self._llm.facts.vocab_size),
                    {kind: costs[draw] for kind, draw in draws.items()},
                )
                yield from self._by_prompts(name, seed, known, scorer, by_kind)

    def _costs(self, draw: Draw, scorer: MaskScorer, provenance: dict[str, Any]) -> CostRow:
        levels, together = self._ladder.cache_levels, self._ladder.together
        costs = scan_levels(scorer, levels, together=together, progress=self._progress)
        scorer.release()
        return CostRow(*draw, asdict(costs), provenance=provenance)

    def _knapsack(self, costs: LevelCosts) -> KnapsackPolicy:
        levels = {item.name: item.levels for item in self._ladder.items}
        return KnapsackPolicy(self._memory, costs, levels=levels)

    def _judged(
        self, draw: Draw, policy: KnapsackPolicy, name: str, scorer: MaskScorer
    ) -> Iterator[Job[PlanRow]]:
        """The jobs of a policy's plans on one text."""
        costs = policy.costs
        depends_on = self._depends_on(
            scorer, costs=digest([costs.one_shot, costs.errors, costs.joint])
        )
        for cell, request in self._requests.items():
            plan, identity = policy.choose(request), (*draw, cell, name)
            make = partial(_plan_row, scorer, plan, identity)
            plans = [Plan(), plan]
            yield Job(PlanRow, identity, depends_on, make, scorer=scorer, plans=plans)

    def _by_prompts(
        self, name: str, seed: int, known: bool, scorer: MaskScorer, costs: KindCosts
    ) -> Iterator[Job[PromptRow]]:
        """The jobs of the plans by the prompts of one text."""
        policy = TextPolicy(costs, self._knapsack)
        prompts = scorer.corpus.tokens[:, : self._settings.prompt_tokens].tolist()
        shares = [policy.text_kinds.shares(prompt) for prompt in prompts]
        made_of = [[own.one_shot, own.errors, own.joint] for own in costs.costs.values()]
        depends_on = self._depends_on(scorer, costs=digest(made_of), shares=shares)
        for cell, request in self._requests.items():
            plans = [policy.for_text(own).choose(request) for own in shares]
            general, identity = policy.choose(request), (seed, cell, name, known)
            make = partial(_prompt_row, scorer, plans, general, identity, shares, len(prompts[0]))
            every = [Plan(), *plans, general]
            yield Job(PromptRow, identity, depends_on, make, scorer=scorer, plans=every)

    def _depends_on(self, scorer: MaskScorer, **more: Any) -> dict[str, Any]:
        scores = digest(dict(scorer.plan_context))
        return {"scores": scores, "ladder": self._ladder.spec, **more}


def _plan_row(
    scorer: MaskScorer, plan: Plan, identity: tuple[Any, ...], provenance: dict[str, Any]
) -> PlanRow:
    named = dict(zip(PlanRow.identity, identity, strict=True))
    losses = window_losses(scorer, plan).tolist()
    return PlanRow(**named, window_losses=losses, provenance=provenance)


def _prompt_row(
    scorer: MaskScorer,
    plans: Sequence[Plan],
    general: Plan,
    identity: tuple[Any, ...],
    shares: Sequence[Sequence[float]],
    prompt_tokens: int,
    provenance: dict[str, Any],
) -> PromptRow:
    named = dict(zip(PromptRow.identity, identity, strict=True))
    return PromptRow(
        **named,
        prompt_tokens=prompt_tokens,
        shares=[list(own) for own in shares],
        window_losses=losses_by_window(scorer, plans),
        general_losses=window_losses(scorer, general).tolist(),
        provenance=provenance,
    )


def window_losses(scorer: MaskScorer, plan: Plan) -> npt.NDArray[np.float64]:
    """ΔNLL of each window, nats per token, (windows,)."""
    return np.asarray(scorer.window_nll(plan) - scorer.window_nll(Plan()))


def losses_by_window(scorer: MaskScorer, plans: Sequence[Plan]) -> list[float]:
    """Return the ΔNLL of each window with a plan of its own, nats per token."""
    by_plan = {plan: window_losses(scorer, plan) for plan in dict.fromkeys(plans)}
    return [float(by_plan[plan][window]) for window, plan in enumerate(plans)]


STUDY = Study(
    "texts",
    "Plans and the calibration text",
    [CostRow, PlanRow, PromptRow],
    text_jobs,
    text_tables,
    data=TextStudy,
    words=lambda study: study.summary,
    figures={"texts": chosen_and_judged},
    frozen=("model", "env.levels", "env.together", "texts.kinds"),
)

if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
