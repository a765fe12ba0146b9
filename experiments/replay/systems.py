"""The systems of a replay: how each of them chooses plans, and what it may remove beyond that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from experiments.config import Config
from experiments.config.serving import UNIFORM_SYSTEMS
from experiments.errors import ExperimentError
from experiments.replay.budgets import Budget
from experiments.replay.harness import System, SystemRun
from experiments.replay.workload import Workload
from rap_env.costs import RequestCosts, request_costs
from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import StaticPolicy, load_policy
from rap_env.policies.method import price_per_byte
from rap_env.policies.tables import TablePolicy
from rap_env.policies.uniform import UniformPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer

if TYPE_CHECKING:
    from rap_env.levels import WeightLevel
    from rap_env.models.live.elastic import ElasticLLM


class OraclePolicy(Policy):
    """Wraps a policy with knowledge of the future budget.

    It chooses for the minimum of the budget over the time that the running requests still need,
    so that the plan need not change while they run.
    """

    name = "oracle"

    def __init__(self, inner: Policy, run: SystemRun) -> None:
        self._inner, self._run = inner, run

    def choose(self, request: Request) -> Plan:
        """Choose a plan for the minimum of the budget while the request runs."""
        run = self._run
        now, margin = run.clock(), run.controller.monitor.margin.bytes
        least = run.budget.least(now, now + run.remaining_s)
        budget_bytes = max(1, min(request.budget_bytes, least - margin))
        return self._inner.choose(Request(request.batch_size, request.seq_len_tokens, budget_bytes))


class GreedyPolicy(Policy):
    """Greedy per byte, measured while serving.

    It keeps one path of removals. A request gets the shortest prefix of the path that fits. If
    the whole path does not fit, the path grows by the block with the smallest rise in NLL per
    freed byte, which takes a measurement of every remaining block. The path is cleared when the
    dense model fits again. The text stays the same, so no mask is measured twice.
    """

    name = "greedy"

    def __init__(self, memory: MemoryModel, scorer: MaskScorer, run: SystemRun) -> None:
        self._memory, self._scorer, self._run = memory, scorer, run
        self._path: list[int] = []

    def choose(self, request: Request) -> Plan:
        """Return the shortest fitting prefix of the path; the path is extended if needed."""
        costs = request_costs(self._memory, request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes:
            self._path.clear()
            return Plan()
        if costs.least_peak_bytes > request.budget_bytes:
            return Plan.removing(*self._memory.facts.blocks)
        while costs.peak_bytes(self._path) > request.budget_bytes:
            self._path.append(self._next(costs, request.budget_bytes))
        return costs.remove_until_fits(self._path, request.budget_bytes)

    def _next(self, costs: RequestCosts, budget_bytes: int) -> int:
        """Measure which block to remove after those of the path."""
        mask = Plan.removing(*self._path)
        over = costs.peak_bytes(self._path) - budget_bytes
        with self._run.measuring():
            nll = self._scorer.nll(mask)
            scan = self._scorer.scan(mask)
        prices = {
            block.index: price_per_byte(measured - nll, min(costs.freed[block.index], over))
            for block, measured in scan.items()
        }
        return min(prices, key=prices.__getitem__)


class SystemFactory:
    """Makes the systems of a replay."""

    def __init__(self, config: Config, llm: ElasticLLM, workload: Workload, budget: Budget) -> None:
        self._config, self._llm, self._memory = config, llm, MemoryModel(llm)
        self._workload, self._budget = workload, budget

    def make(self, name: str, run: SystemRun) -> System:
        """Make a system by its name, which `run` is to serve."""
        full = self._config.replay.max_batch_size
        blocks = [(index,) for index in self._guard_order or ()]
        if name in UNIFORM_SYSTEMS:
            return self._uniform(name)
        match name:
            case "dense":
                return System(name, StaticPolicy(Plan(), name), ())
            case "static_gsi":
                return self._static(name, blocks, full)
            case "static_gsi_lean":
                return self._static(name, blocks, 1)
            case "static_shortgpt":
                return self._static(name, self._layers(), full)
            case "greedy":
                tokens = self._calibration.tokens[:1, : self._config.replay.greedy_tokens]
                scorer = MaskScorer(self._llm, Corpus.of_tokens(tokens))
                greedy = GreedyPolicy(self._memory, scorer, run)
                return System(name, greedy, self._guard_order)
            case "rap":
                return System(name, self._trained, self._trained.order or self._guard_order)
            case "knapsack":
                return System(name, load_policy(self._config.replay.knapsack, self._memory), None)
        frontier = load_policy(self._config.replay.frontier, self._memory)
        if not isinstance(frontier, TablePolicy):
            raise ExperimentError(
                f"replay.frontier must be a frontier artifact (.json), but "
                f"{self._config.replay.frontier} is not; build one with "
                "`python -m experiments.profile frontier.evaluations=3000`."
            )
        oracle = OraclePolicy(frontier, run)
        return System(name, oracle if name == "oracle" else frontier, self._guard_order)

    @cached_property
    def _trained(self) -> Policy:
        return load_policy(self._config.replay.policy, self._memory)

    def _uniform(self, name: str) -> System:
        """Make a system with the same levels at all times, which removes blocks in GSI order."""
        facts = self._memory.facts
        _, weights, cache = name.split("_")
        lowered = facts.blocks_at(cast("WeightLevel", weights))
        if weights != "native" and "int8" in facts.embedding_levels:
            lowered[EMBEDDINGS] = "int8"
        plan = Plan.uniform(facts.num_layers, caches=cache).lower(lowered)
        order = self._guard_order or ()
        policy = UniformPolicy(self._memory, [plan], order, name)
        return System(name, policy, order or None, plan)

    def _static(self, name: str, groups: Sequence[tuple[int, ...]], rows: int) -> System:
        """Make a system with the least pruned mask of an order that always fits.

        The mask removes the fewest groups of blocks with which a batch of `rows` longest requests
        fits the minimum of the budget. If removing all groups does not suffice, the batch shrinks.
        A large batch never waits; a batch of one keeps the largest model that can serve every
        request at any time, and further requests wait for memory.
        """
        if not groups:
            raise ExperimentError(
                f"The policy {self._config.replay.policy} holds no GSI order; set replay.gsi to "
                "the gsi.json of `python -m experiments.profile`."
            )
        workload, timeout_s = self._workload, self._config.replay.queue_timeout_s
        least = self._budget.least(0.0, workload.last_s + timeout_s)
        for batch in range(rows, 0, -1):
            request = Request(batch, workload.longest_tokens, least)
            mask = Plan()
            for group in [(), *groups]:
                mask = mask.without(*group)
                if self._memory.peak_bytes(mask, request) <= least:
                    return System(name, StaticPolicy(mask, name), (), mask)
        raise ExperimentError(
            f"No mask of {self._llm.name} fits one request of {workload.longest_tokens} "
            f"tokens into the minimum of the budget ({least:,} bytes); raise the budget's floor."
        )

    @cached_property
    def _guard_order(self) -> tuple[int, ...] | None:
        """The GSI order; None without one, and the controller then removes the largest blocks."""
        path = self._config.replay.gsi
        if path is not None:
            from rap_env.importance.profiles import GSIProfile

            try:
                return GSIProfile.load(path, self._llm).full_order
            except FileNotFoundError:
                raise ExperimentError(
                    f"There is no GSI artifact {path}; measure one with "
                    "`python -m experiments.profile`."
                ) from None
        if self._trained.order and not self._trained.lowers:
            return self._trained.order
        try:
            packaged = load_policy("rap-v0", self._memory)
        except ArtifactError:  # of a model that it cannot serve
            return None
        return packaged.order

    def _layers(self) -> list[tuple[int, ...]]:
        """Return whole layers in ascending order of block influence (ShortGPT)."""
        from rap_env.importance.one_shot_scores import layer_influence

        scorer = MaskScorer(self._llm, self._calibration)
        influence = layer_influence(self._llm, scorer.batches)
        ranked = np.argsort(influence, kind="stable").tolist()
        return [(2 * layer, 2 * layer + 1) for layer in ranked]

    @cached_property
    def _calibration(self) -> Corpus:
        """The text that masks are measured on; it shares nothing with the prompts."""
        text = CorpusConfig(**asdict(self._config.calibration))
        return load_corpus(text, self._llm, progress=self._config.progress)
