"""How an agent learns: from real scores alone, or from predicted ones that real ones correct.

A teacher may be imitated first (`warm_start`). With `score_model.rounds`, each round fits the
score model to all real scores that this training knows, trains on its predictions at the speed
of arrays, and then really scores what the policy now chooses (Sutton 1991, Dyna; Anthony et al.
2017, expert iteration, arXiv 1705.08439). Where the policy found a hole in the score model, the
next round knows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from agents.algorithms import AgentConfig
from agents.baselines.searches import GreedyPerByteBaseline
from agents.imitation import Demonstration, ImitationConfig, imitate
from agents.trained_policy import TrainedPolicy
from agents.training import MetricSink, TrainResult, WarmStart
from agents.training import train as train_agent
from experiments.comparison.records import append_record, read_records
from experiments.comparison.run_folder import TABLE_FILE
from experiments.config import Config
from experiments.training.score_tables import importance_orders, planned_masks, table_of
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.context.table import TableContext
from rap_env.envs.vector import RAPPruneVectorEnv
from rap_env.observation import ObservationBuilder
from rap_env.request import Request
from rap_env.scoring.store import mask_from_indices
from rap_env.workload import make_sampler

log = logging.getLogger(__name__)

ROUNDS_FILE = "rounds.jsonl"
"""What the policy chose after each round: real and predicted scores."""

_DRAWN = 4  # masks drawn for each request that is verified; the one that promises most is scored


def learn(
    config: Config,
    agent: AgentConfig,
    context: PruningContext,
    folder: Path,
    sinks: Sequence[MetricSink],
) -> TrainResult:
    """Train an agent, or go on with it.

    Args:
        config: All settings.
        agent: The agent in the trainer's own terms.
        context: The model, its scores and its importance.
        folder: The run's folder.
        sinks: Where metrics go.

    Returns:
        What it came to; ``evaluations`` counts the masks that had to be scored by the model.

    Raises:
        RapError: A setting cannot be, the folder holds another run, or training failed.
    """
    if not config.score_model.rounds:
        return _train(config, agent, context, context, folder, sinks)
    known = _known(config, context, folder)
    rounds = config.score_model.rounds
    for number in range(rounds):
        steps = agent.total_timesteps * (number + 1) // rounds
        part = replace(agent, total_timesteps=steps)
        table = table_of(
            config, context, known,
            members=config.score_model.members, pessimism=config.score_model.pessimism,
        )  # fmt: skip
        bench = TableContext(
            table, TABLE_FILE, importance=config.importance.method, frontier=context.frontier_path
        )
        result = _train(config, part, context, bench, folder, sinks)
        known |= _verified(config, number, context, bench, folder, sinks, result.timesteps)
    table.save(folder / TABLE_FILE)
    return replace(result, evaluations=len(known))


def make_envs(config: Config, context: PruningContext, num_envs: int) -> RAPPruneVectorEnv:
    """The environments on a context, stepped and scored together.

    Raises:
        RapError: A setting of workload, reward or environment cannot be.
    """
    return RAPPruneVectorEnv(
        num_envs=num_envs,
        autoreset_mode=AutoresetMode.SAME_STEP,
        context=context,
        workload=config.workload,
        reward=config.reward,
        tasks=asdict(config.env.tasks) if config.env.tasks.names else None,
        infeasible=config.env.infeasible,
        invalid_action_penalty=config.env.invalid_action_penalty,
        max_invalid_actions=config.env.max_invalid_actions,
    )


def draw_requests(config: Config, context: PruningContext, count: int, *key: int) -> list[Request]:
    """Requests of the workload that need pruning and that some mask fits."""
    memory = context.memory
    sampler = make_sampler(config.workload, memory)
    rng = np.random.default_rng([config.seed, *key])
    found: list[Request] = []
    for _ in range(100 * count):
        request = sampler.sample(rng)
        dense = memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
        if memory.least_peak_bytes(request) <= request.budget_bytes < dense:
            found.append(request)
        if len(found) == count:
            break
    return found


def _train(
    config: Config,
    agent: AgentConfig,
    context: PruningContext,
    bench: PruningContext,
    folder: Path,
    sinks: Sequence[MetricSink],
) -> TrainResult:
    """One training on the scores of `bench`."""
    return train_agent(
        agent,
        lambda num_envs: make_envs(config, bench, num_envs),
        folder,
        log_fns=sinks,
        progress=config.progress,
        warm_start=_warm_start(config, bench),
    )


def _warm_start(config: Config, bench: PruningContext) -> WarmStart | None:
    settings = config.warm_start
    if settings.teacher == "none":
        return None

    def start(model: Any) -> None:
        shown = demonstrations(config, bench)
        how = ImitationConfig(
            updates=settings.updates, learning_rate=settings.learning_rate, seed=config.seed
        )
        builder = ObservationBuilder(bench.memory, bench.features)
        result = imitate(model, shown, builder, how, progress=config.progress)
        log.info(
            "Warm start: %d masks of the teacher %s; its choice in %.0f %% of states.",
            len(shown), settings.teacher, 100 * result.agreement,
        )  # fmt: skip

    return start


def demonstrations(config: Config, bench: PruningContext) -> list[Demonstration]:
    """What the teacher does with requests of the workload.

    Raises:
        ArtifactError: The teacher is the frontier, and there is none.
    """
    settings = config.warm_start
    requests = draw_requests(config, bench, settings.requests, 1)
    if settings.teacher == "greedy":
        greedy = GreedyPerByteBaseline(bench)
        masks: list[BlockMask | None] = [greedy.choose(request) for request in requests]
    else:
        masks = [bench.frontier.best(bench.memory, request) for request in requests]
    pairs = zip(requests, masks, strict=True)
    return [Demonstration(request, mask) for request, mask in pairs if mask]


def _known(config: Config, context: PruningContext, folder: Path) -> dict[BlockMask, float]:
    """Real scores before the first round: those of the frontier, or of planned masks."""
    if Path(context.frontier_path or "").is_file():
        return dict(context.frontier.scores)
    blocks, wanted = context.memory.facts.num_blocks, config.score_model.first_masks
    plan = planned_masks(blocks, importance_orders(context, config), config.seed)
    masks = list(islice(plan, wanted))
    return dict(zip(masks, context.scorer.nll_many(masks), strict=True))


def _verified(
    config: Config,
    number: int,
    context: PruningContext,
    bench: TableContext,
    folder: Path,
    sinks: Sequence[MetricSink],
    step: int,
) -> dict[BlockMask, float]:
    """Real scores of what the policy chooses after a round, and a record of them."""
    path = folder / ROUNDS_FILE
    done = {record["round"]: record for record in read_records(path)}
    if number not in done:
        policy = TrainedPolicy.load(folder, bench, seed=number)
        requests = draw_requests(config, context, config.score_model.verify_requests, 2)
        favourites, others = [], []
        for request in requests:
            first, *drawn = policy.sample(request, 1 + _DRAWN)
            favourites.append(first)
            others.append(min(drawn, key=bench.scorer.nll))
        masks = list(dict.fromkeys([*favourites, *others]))
        real = dict(zip(masks, context.scorer.nll_many(masks), strict=True))
        dense = context.scorer.dense_nll
        done[number] = {
            "round": number,
            "step": step,
            "loss": float(np.mean([real[mask] - dense for mask in favourites])),
            "predicted_loss": float(np.mean([bench.scorer.nll(m) - dense for m in favourites])),
            "scored": [[list(mask.names), nll] for mask, nll in real.items()],
        }
        append_record(path, done[number])
    record = done[number]
    metrics = {f"verify/{key}": float(record[key]) for key in ("loss", "predicted_loss")}
    for sink in sinks:
        sink(metrics, step)
    log.info(
        "Round %d: what the policy chooses loses %.4f nats per token, predicted %.4f.",
        number, record["loss"], record["predicted_loss"],
    )  # fmt: skip
    return scored_masks(record)


def scored_masks(record: Mapping[str, Any]) -> dict[BlockMask, float]:
    """Return the NLL of the masks that a round scored, nats per token.

    Earlier versions wrote masks as comma-separated indices.
    """
    scored = record["scored"]
    if isinstance(scored, dict):
        return {mask_from_indices(key): nll for key, nll in scored.items()}
    return {BlockMask.of(*names): nll for names, nll in scored}
