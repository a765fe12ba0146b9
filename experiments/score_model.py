"""Training on measured scores, or on predicted scores that are corrected with measured ones.

Training may start with imitation of a teacher (`warm_start`). With `score_model.rounds`, each
round fits the score model to all scores measured so far, trains the agent on its predictions,
and then measures the plans that the policy chooses (Sutton 1991, Dyna; Anthony et al. 2017,
expert iteration, arXiv 1705.08439). If the policy exploits an error of the score model, the
next round corrects it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from agents.algorithms import AgentConfig
from agents.imitation import Demonstration, imitate
from agents.trained_policy import TrainedPolicy
from agents.training import MetricSink, TrainResult, WarmStart
from agents.training import train as train_agent
from experiments.comparison.run_records import TABLE_FILE
from experiments.config import Config
from experiments.contexts import make_ladder_bytes
from experiments.study.console import ExperimentError
from experiments.study.json_records import append_record, read_records
from rap_env.context.base import PruningContext, make_encoder
from rap_env.context.opening import require_live
from rap_env.context.table import TableContext
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.plan_table import PlanTable
from rap_env.plan import Plan
from rap_env.policies.loading import make_method
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.held_out import HeldOutLosses
from rap_env.scoring.score_table import ScoreTable
from rap_env.workload import make_sampler

ROUNDS_FILE = "rounds.jsonl"
"""Measured and predicted scores of the policy's plans after each round."""


def table_of(
    config: Config,
    context: PruningContext,
    scores: Mapping[Plan, float],
    *,
    levels: LevelCosts | None = None,
    held_out: HeldOutLosses | None = None,
    **model: Any,
) -> ScoreTable:
    """Make a score table from scores of a context.

    Args:
        config: All settings.
        context: What the scores were measured with.
        scores: Mean NLL of plans, nats per token.
        levels: Costs of levels, from which plans are predicted; None predicts masks only.
        held_out: Losses on held-out text, if some were measured.
        **model: ``members`` and ``pessimism`` of the score model.

    Raises:
        ArtifactError: There are too few scores.
    """
    scorer = context.scorer
    with_gsi = config.importance.method == "gsi"
    return ScoreTable.fitted(
        context.memory.facts,
        scores,
        seed=config.seed,
        lowered=None if levels is None else levels.delta_nll,
        levels=None if levels is None else asdict(levels),
        held_out=held_out,
        **model,
        context=dict(scorer.context),
        text=context.corpus.provenance,
        settings=_settings(config, context),
        one_shot=asdict(context.one_shot),
        gsi=asdict(context.gsi) if with_gsi else None,
        evaluation_s=scorer.evaluation_s,
    )


def _settings(config: Config, context: PruningContext) -> dict[str, Any]:
    """Return the settings recorded in the table; they contain no local path."""
    text = asdict(CorpusConfig(**asdict(config.calibration), role="calibration"))
    text["source"] = context.corpus.provenance["source"]
    del text["sha256"]  # `ScoreTable.text` has it
    return {
        "device": context.llm.device.type,
        "dtype": context.memory.facts.dtype,
        "calibration": text,
        "importance": config.importance.method,
        "gsi_removals": config.importance.gsi_removals,
        "gsi_method": config.importance.gsi_method,
    }


def stored_scores(context: PruningContext) -> dict[Plan, float]:
    """Return the mean NLL of all stored plans of this model and text, nats per token.

    Args:
        context: A context of a live model with a store.
    """
    from rap_env.scoring.scorer import METRIC

    store, scorer = context.store, require_live(context).scorer
    assert store is not None
    return {plan: float(np.mean(nll)) for plan, nll in store.rows(scorer.context, METRIC)}


def native_shift(table: PlanTable, path: str, context: PruningContext) -> float:
    """Return what to add to a table's NLL to compare it with what the context measures.

    Machines differ in the last digits, so the table's rises over the native model are kept,
    on top of the native model's NLL here; nats per token, 0 on the machine that measured the
    table.

    Raises:
        ExperimentError: The table was measured on other text.
    """
    measured = table.provenance["scoring"]["tokens"]
    here = context.scorer.context["tokens"]
    if measured != here:
        raise ExperimentError(
            f"{path} was measured on other text (SHA-256 {measured[:12]}) than the calibration "
            f"text ({here[:12]}); use its settings of the calibration text. Text that a model "
            "writes itself differs between machines: measure a table of your own with "
            "`python -m experiments.profile`."
        )
    return context.scorer.native_nll - table.dense_nll


def scored_masks(record: Mapping[str, Any]) -> dict[Plan, float]:
    """Return the NLL of the plans that a round scored, nats per token."""
    return {Plan.of(plan): nll for plan, nll in record["scored"]}


log = logging.getLogger(__name__)

_DRAWN = 4  # sampled plans for each verified request; the best by prediction is measured


def learn(
    config: Config, agent: AgentConfig, context: PruningContext, folder: Path, sink: MetricSink
) -> TrainResult:
    """Train an agent, or resume its training.

    A score table that it is trained on, fitted here or given as the model, is saved as
    `TABLE_FILE` in its folder.

    Args:
        config: All settings.
        agent: The agent.
        context: The model and text.
        folder: The run's folder.
        sink: Takes the metrics.

    Returns:
        The result; ``evaluations`` counts the plans scored by the model, also those that
        it scored for a table that is the model here.
    """
    if not config.score_model.rounds:
        result = _train(config, agent, context, folder, sink)
        if not isinstance(context, TableContext):
            return result
        context.table.save(folder / TABLE_FILE)
        return replace(result, evaluations=len(context.table.scores))
    text = _ScoredText(config, context)
    rounds = config.score_model.rounds
    for number in range(rounds):
        steps = agent.total_timesteps * (number + 1) // rounds
        predicted = text.predicted()
        part = replace(agent, total_timesteps=steps)
        result = _train(config, part, predicted, folder, sink)
        text.verify(number, predicted, folder, sink, result.timesteps)
    predicted.table.save(folder / TABLE_FILE)
    return replace(result, evaluations=len(text.known))


class _ScoredText:
    """The scores of a text that are known, and the score models fitted to them.

    Attributes:
        known: NLL of plans, nats per token.
    """

    def __init__(self, config: Config, context: PruningContext) -> None:
        self.known = _known(config, context)
        self._config, self._context = config, context
        self._levels = None
        if config.env.task.layout == "ladder":
            ladder = make_ladder_bytes(config, context).ladder
            self._levels = context.level_costs(ladder)

    def predicted(self) -> TableContext:
        """Return a context whose scores a score model predicts, fitted to what is known now."""
        settings = self._config.score_model
        table = table_of(
            self._config, self._context, self.known, levels=self._levels,
            members=settings.members, pessimism=settings.pessimism,
        )  # fmt: skip
        importance, frontier = self._config.importance.method, self._context.frontier_path
        return TableContext(table, TABLE_FILE, importance=importance, frontier=frontier)

    def verify(
        self, number: int, predicted: TableContext, folder: Path, sink: MetricSink, step: int
    ) -> None:
        """Measure and record the plans that the policy chooses after a round."""
        path = folder / ROUNDS_FILE
        done = {record["round"]: record for record in read_records(path)}
        if number not in done:
            policy = TrainedPolicy.load(folder, predicted, seed=number)
            done[number] = {"round": number, "step": step, **self._measured(policy, predicted)}
            append_record(path, done[number])
        record = done[number]
        measured = ("delta_nll", "predicted_delta_nll")
        sink({f"verify/{key}": float(record[key]) for key in measured}, step)
        log.info(
            "Round %d: ΔNLL of the policy %.4f nats per token, predicted %.4f.",
            number, record["delta_nll"], record["predicted_delta_nll"],
        )  # fmt: skip
        self.known |= scored_masks(record)

    def _measured(self, policy: TrainedPolicy, predicted: TableContext) -> dict[str, Any]:
        """Measure the policy's favourites for some requests, and the best of its other samples."""
        config, context = self._config, self._context
        requests = draw_requests(config, context, config.score_model.verify_requests, 2)
        favourites, others = [], []
        for request in requests:
            first, *drawn = policy.sample(request, 1 + _DRAWN)
            favourites.append(first)
            others.append(min(drawn, key=predicted.scorer.nll))
        plans = list(dict.fromkeys([*favourites, *others]))
        real = dict(zip(plans, context.scorer.nll_many(plans), strict=True))
        native = context.scorer.native_nll
        rises = [predicted.scorer.nll(plan) - native for plan in favourites]
        return {
            "delta_nll": float(np.mean([real[plan] - native for plan in favourites])),
            "predicted_delta_nll": float(np.mean(rises)),
            "scored": [[json.loads(plan.to_json()), nll] for plan, nll in real.items()],
        }


def make_envs(config: Config, context: PruningContext, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """Make the vector environment on a context."""
    return gym.make_vec(
        config.env.id,
        num_envs,
        autoreset_mode=AutoresetMode.SAME_STEP,
        context=context,
        workload=config.workload,
        reward=config.reward,
        tasks=asdict(config.env.tasks) if config.env.tasks.names else None,
        infeasible="clip",
        invalid_action_penalty=config.env.invalid_action_penalty,
        max_invalid_actions=config.env.max_invalid_actions,
        **config.env.arguments,
    )


def draw_requests(config: Config, context: PruningContext, count: int, *key: int) -> list[Request]:
    """Draw workload requests that need pruning and that some plan can fit."""
    ladder_bytes = make_ladder_bytes(config, context)
    sampler = make_sampler(config.workload, context.memory)
    rng = np.random.default_rng([config.seed, *key])
    requests: list[Request] = []
    for _ in range(100 * count):
        request = sampler.sample(rng)
        costs = ladder_bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.least_peak_bytes <= request.budget_bytes < costs.native_peak_bytes:
            requests.append(request)
        if len(requests) == count:
            break
    return requests


def _train(
    config: Config, agent: AgentConfig, context: PruningContext, folder: Path, sink: MetricSink
) -> TrainResult:
    """Train the agent on the scores of a context."""
    return train_agent(
        agent,
        lambda num_envs: make_envs(config, context, num_envs),
        folder,
        log_fns=(sink,),
        progress=config.progress,
        warm_start=_warm_start(config, context),
    )


def _warm_start(config: Config, context: PruningContext) -> WarmStart | None:
    settings = config.warm_start
    if settings.teacher in (None, "none"):
        return None

    def start(model: Any) -> None:
        shown = demonstrations(config, context)
        encoder = make_encoder(context, config.env.task.layout, **config.env.ladder)
        agreement = imitate(
            model,
            shown,
            encoder,
            updates=settings.updates,
            batch_size=settings.batch_size,
            seed=config.seed,
            progress=config.progress,
        )
        log.info(
            "Warm start: %d plans of the teacher %s; agreement in %.0f %% of states.",
            len(shown), settings.teacher, 100 * agreement,
        )  # fmt: skip

    return start


def demonstrations(config: Config, context: PruningContext) -> list[Demonstration]:
    """Return the teacher's plans for requests of the workload.

    Raises:
        ArtifactError: The teacher is the frontier table, and there is none.
    """
    settings, ladder_bytes = config.warm_start, make_ladder_bytes(config, context)
    requests = draw_requests(config, context, settings.requests, 1)
    name = "greedy_per_byte" if settings.teacher == "greedy" else str(settings.teacher)
    teacher = make_method(name, context, ladder_bytes, config.seed)
    return [Demonstration(request, teacher.choose(request)) for request in requests]


def _known(config: Config, context: PruningContext) -> dict[Plan, float]:
    """Return the scores of the frontier table, which are known before the first round.

    Raises:
        ArtifactError: There is no table.
        ExperimentError: The table was measured on other text than the calibration text.
    """
    ladder, table = make_ladder_bytes(config, context).ladder, context.frontier
    shift = native_shift(table, str(context.frontier_path), context)
    # Without costs of levels, the scores of plans that lower items are of no use.
    return {
        plan: nll + shift
        for plan, nll in table.scores.items()
        if not ladder.removes_only or ladder.has(plan)
    }
