"""The systems of a replay: how each of them chooses plans, and what it may remove beyond that."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, cast

from experiments.config import Config
from experiments.config.replay_settings import UNIFORM_SYSTEMS
from experiments.replay.budgets import Budget
from experiments.replay.system_run import System, SystemRun
from experiments.replay.workload import Workload
from experiments.study.experiment_errors import ExperimentError
from rap_env.context.live import LiveContext
from rap_env.errors import ArtifactError, InfeasibleBudgetError
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import OrderPolicy, StaticPolicy, load_policy, make_method
from rap_env.policies.tables import TablePolicy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus

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


class MeasuredPolicy(Policy):
    """Wraps a method that runs the model to choose, so that its time and memory are counted."""

    def __init__(self, method: Policy, run: SystemRun) -> None:
        self.name, self._method, self._run = method.name, method, run

    def choose(self, request: Request) -> Plan:
        """Choose a plan; that without any block if none fits."""
        try:
            with self._run.measuring():
                return self._method.choose(request)
        except InfeasibleBudgetError:
            return Plan.removing(*range(MemoryModel(self._run.llm).facts.num_blocks))


class SystemFactory:
    """Makes the systems of a replay."""

    def __init__(self, config: Config, llm: ElasticLLM, workload: Workload, budget: Budget) -> None:
        self._config, self._llm, self._memory = config, llm, MemoryModel(llm)
        self._workload, self._budget = workload, budget

    def make(self, name: str, run: SystemRun) -> System:
        """Make a system by its name, which `run` is to serve."""
        full = self._config.replay.max_batch_size
        if name in UNIFORM_SYSTEMS:
            return self._uniform(name)
        match name:
            case "dense":
                return System(name, StaticPolicy(Plan(), name), ())
            case "static_gsi":
                return self._static(name, self._ordered(), full)
            case "static_gsi_lean":
                return self._static(name, self._ordered(), 1)
            case "static_shortgpt":
                return self._static(name, self._method("shortgpt"), full)
            case "greedy":
                greedy = self._method("greedy_per_byte", self._config.replay.greedy_tokens)
                return System(name, MeasuredPolicy(greedy, run), self._guard_order)
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
        policy = OrderPolicy(self._memory, order, [plan], name)
        return System(name, policy, order or None, plan)

    def _static(self, name: str, policy: Policy, rows: int) -> System:
        """Make a system with the least pruned mask of a policy that always fits.

        The mask is that for a batch of `rows` longest requests within the minimum of the budget;
        if none fits, the batch shrinks. A large batch never waits; a batch of one keeps the largest
        model that can serve every request at any time, and further requests wait for memory.
        """
        workload, timeout_s = self._workload, self._config.replay.queue_timeout_s
        least = self._budget.least(0.0, workload.last_s + timeout_s)
        for batch in range(rows, 0, -1):
            request = Request(batch, workload.longest_tokens, least)
            with suppress(InfeasibleBudgetError):
                mask = policy.choose(request)
                if self._memory.peak_bytes(mask, request) <= least:
                    return System(name, StaticPolicy(mask, name), (), mask)
        raise ExperimentError(
            f"No mask of {self._llm.name} fits one request of {workload.longest_tokens} "
            f"tokens into the minimum of the budget ({least:,} bytes); raise the budget's floor."
        )

    def _ordered(self) -> Policy:
        if not self._guard_order:
            raise ExperimentError(
                f"The policy {self._config.replay.policy} holds no GSI order, which static systems "
                "need; give the policy of a training with importance=gsi."
            )
        return OrderPolicy(self._memory, self._guard_order)

    def _method(self, name: str, tokens: int | None = None) -> Policy:
        """A method on the calibration text, or its first tokens, which shares none with prompts."""
        text = CorpusConfig(**asdict(self._config.calibration))
        corpus = load_corpus(text, self._llm, progress=self._config.progress)
        if tokens is not None:
            corpus = Corpus.of_tokens(corpus.tokens[:1, :tokens])
        return make_method(name, LiveContext(self._llm, corpus, importance="none", progress=False))

    @cached_property
    def _guard_order(self) -> tuple[int, ...] | None:
        """The GSI order; None without one, and the controller then removes the largest blocks."""
        if self._trained.order and not self._trained.weight_levels:
            return self._trained.order
        try:
            packaged = load_policy("rap-v0", self._memory)
        except ArtifactError:  # of a model that it cannot serve
            return None
        return packaged.order
