"""The systems of a replay: how each of them chooses masks, and what it may remove beyond that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from agents.baselines.base import price_per_byte
from experiments.config import Config
from experiments.config.serving import UNIFORM_SYSTEMS
from experiments.errors import ExperimentError
from experiments.replay.budgets import Budget
from experiments.replay.workload import Workload
from rap_env.artifacts import digest
from rap_env.blocks import BlockMask
from rap_env.costs import RequestCosts, request_costs
from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, CompressionPlan, MaskOrPlan
from rap_env.policies.base import Policy
from rap_env.policies.knapsack import KnapsackPolicy
from rap_env.policies.loading import (
    FrontierPolicy,
    NetworkPolicy,
    StaticPolicy,
    load_policy,
)
from rap_env.policies.network import LadderPolicy
from rap_env.policies.uniform import UniformPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer

if TYPE_CHECKING:
    from rap_env.levels import WeightLevel
    from rap_env.models.live.elastic import ElasticLLM

_GSI_SYSTEMS = ("static_gsi", "static_gsi_lean")


class ReplayState(Protocol):
    """State of the running replay that `OraclePolicy` and `GreedyPolicy` read."""

    def remaining_s(self) -> float:
        """Seconds until the running requests finish."""

    def time_s(self) -> float:
        """Current time of the replay."""

    def margin_bytes(self) -> int:
        """Bytes that the controller keeps free below the budget."""

    def measuring(self) -> AbstractContextManager[None]:
        """Enter while a policy runs the model itself, so that its time and memory are counted."""


class OraclePolicy(Policy):
    """Wraps a policy with knowledge of the future budget.

    It chooses for the minimum of the budget over the time that the running requests still need,
    so that the mask need not change while they run.
    """

    name = "oracle"

    def __init__(self, inner: Policy, budget: Budget, state: ReplayState) -> None:
        self._inner = inner
        self._budget = budget
        self._state = state

    def choose(self, request: Request) -> MaskOrPlan:
        """Choose a mask or plan for the minimum of the budget while the request runs."""
        now = self._state.time_s()
        least = self._budget.least(now, now + self._state.remaining_s())
        budget_bytes = max(1, min(request.budget_bytes, least - self._state.margin_bytes()))
        return self._inner.choose(Request(request.batch_size, request.seq_len_tokens, budget_bytes))


class GreedyPolicy(Policy):
    """Greedy per byte, measured while serving.

    It keeps one path of removals. A request gets the shortest prefix of the path that fits. If
    the whole path does not fit, the path grows by the block with the smallest rise in NLL per
    freed byte, which takes a measurement of every remaining block. The path is cleared when the
    dense model fits again. The text stays the same, so no mask is measured twice.
    """

    name = "greedy"

    def __init__(self, memory: MemoryModel, scorer: MaskScorer, state: ReplayState) -> None:
        self._memory = memory
        self._scorer = scorer
        self._state = state
        self._path: list[int] = []

    def choose(self, request: Request) -> BlockMask:
        """Return the shortest fitting prefix of the path; the path is extended if needed."""
        costs = request_costs(self._memory, request.batch_size, request.seq_len_tokens)
        if costs.dense_peak_bytes <= request.budget_bytes:
            self._path.clear()
            return BlockMask()
        if costs.least_peak_bytes > request.budget_bytes:
            return BlockMask.all_of(self._memory.facts.blocks)
        while costs.peak_bytes(self._path) > request.budget_bytes:
            self._path.append(self._next(costs, request.budget_bytes))
        return costs.remove_until_fits(self._path, request.budget_bytes)

    def _next(self, costs: RequestCosts, budget_bytes: int) -> int:
        """Measure which block to remove after those of the path."""
        mask = BlockMask.of(*self._path)
        over = costs.peak_bytes(self._path) - budget_bytes
        with self._state.measuring():
            nll = self._scorer.nll(mask)
            scan = self._scorer.scan(mask)
        prices = {
            block.index: price_per_byte(found - nll, min(costs.freed[block.index], over))
            for block, found in scan.items()
        }
        return min(prices, key=prices.__getitem__)


@dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        name: As in ``replay.systems``.
        guard_order: Blocks that may be removed if the policy's mask does not fit, in the order of
            removal; None leaves that to the controller, an empty tuple forbids it.
        notes: Facts for the records, such as a static mask.
        start: The mask or plan before the first request.
    """

    name: str
    policy: Policy
    guard_order: tuple[int, ...] | None
    notes: dict[str, Any] = field(default_factory=dict)
    start: MaskOrPlan = BlockMask()


class SystemFactory:
    """Makes the systems of a replay."""

    def __init__(self, config: Config, llm: ElasticLLM, workload: Workload, budget: Budget) -> None:
        self._config = config
        self._llm = llm
        self._workload = workload
        self._budget = budget
        self._memory = MemoryModel(llm)

    def make(self, name: str, state: ReplayState) -> System:
        """Make a system by its name."""
        settings = self._config.replay
        full = settings.static_batch or settings.max_batch_size
        if name in _GSI_SYSTEMS:
            groups = [(index,) for index in self._gsi_order()]
            return self._static(name, groups, full if name == "static_gsi" else 1)
        if name in UNIFORM_SYSTEMS:
            return self._uniform(name)
        makers: dict[str, Callable[[], System]] = {
            "dense": lambda: System("dense", StaticPolicy(BlockMask(), "dense"), ()),
            "static_shortgpt": lambda: self._static("static_shortgpt", self._layers(), full),
            "greedy": lambda: self._greedy(state),
            "frontier": lambda: System(name, self._frontier, self._guard_order),
            "rap": lambda: System(name, self._trained, self._trained.order or self._guard_order),
            "knapsack": lambda: System(name, self._knapsack, None),
            "oracle": lambda: System(
                name, OraclePolicy(self._frontier, self._budget, state), self._guard_order
            ),
        }
        return makers[name]()

    def check(self, names: Iterable[str]) -> None:
        """Load the files of all systems, so that a missing one fails before any system runs."""
        for name in names:
            self.source_sha256(name)

    def source_sha256(self, name: str) -> str | None:
        """Hash of the policy, table or order that a system reads from a file; None without one."""
        if name == "rap" and isinstance(self._trained, (NetworkPolicy, LadderPolicy)):
            arrays = self._trained.file.weights.arrays()
            weights = {name: array.tolist() for name, array in arrays.items()}
            return digest([weights, list(self._trained.order or ())])
        if name in ("frontier", "oracle"):
            # The encoding of masks in earlier records, so that hashes stay comparable.
            scores = self._frontier.frontier.scores
            return digest({",".join(map(str, mask)): nll for mask, nll in scores.items()})
        if name == "knapsack" and isinstance(self._knapsack, KnapsackPolicy):
            return digest([self._knapsack.costs.one_shot, self._knapsack.costs.joint])
        if name in UNIFORM_SYSTEMS:
            return digest(list(self._uniform(name).guard_order or ()))
        return digest(list(self._gsi_order())) if name in _GSI_SYSTEMS else None

    @cached_property
    def _trained(self) -> Policy:
        return load_policy(self._config.replay.policy, self._memory)

    @cached_property
    def _packaged(self) -> Policy | None:
        """The packaged policy over blocks; None for a model that it cannot serve."""
        try:
            return load_policy("rap-v0", self._memory)
        except ArtifactError:
            return None

    @cached_property
    def _knapsack(self) -> Policy:
        return load_policy(self._config.replay.knapsack, self._memory)

    def _uniform(self, name: str) -> System:
        """Make a system with the same levels at all times, which removes blocks in GSI order."""
        facts = self._memory.facts
        _, weights, cache = name.split("_")
        lowered = facts.blocks_at(cast("WeightLevel", weights))
        if weights != "native" and "int8" in facts.embedding_levels:
            lowered[EMBEDDINGS] = "int8"
        plan = CompressionPlan.uniform(facts.num_layers, caches=cache).lower(lowered)
        order = self._guard_order or ()
        policy = UniformPolicy(self._memory, [plan], order, name)
        return System(name, policy, order or None, {"plan": plan.levels}, plan)

    @cached_property
    def _frontier(self) -> FrontierPolicy:
        found = load_policy(self._config.replay.frontier, self._memory)
        if not isinstance(found, FrontierPolicy):
            raise ExperimentError(
                f"replay.frontier must be a frontier artifact (.json), but "
                f"{self._config.replay.frontier} is not; build one with "
                "`python -m experiments.profile frontier.evaluations=3000`."
            )
        return found

    @cached_property
    def _guard_order(self) -> tuple[int, ...] | None:
        """The GSI order; None without one, and the controller then removes the largest blocks."""
        try:
            return self._gsi_order()
        except (ExperimentError, OSError, ValueError):
            return None

    def _greedy(self, state: ReplayState) -> System:
        tokens = self._calibration.tokens[:1, : self._config.replay.greedy_tokens]
        scorer = MaskScorer(self._llm, Corpus.of_tokens(tokens))
        policy = GreedyPolicy(self._memory, scorer, state)
        return System("greedy", policy, self._guard_order, {"text_tokens": tokens.numel()})

    def _static(self, name: str, groups: Sequence[tuple[int, ...]], rows: int) -> System:
        """Make a system with the least pruned mask of an order that always fits.

        The mask removes the fewest groups of blocks with which a batch of `rows` longest requests
        fits the minimum of the budget. If removing all groups does not suffice, the batch shrinks.
        A large batch never waits; a batch of one keeps the largest model that can serve every
        request at any time, and further requests wait for memory.
        """
        settings = self._config.replay
        least = self._budget.least(0.0, self._workload.last_s + settings.queue_timeout_s)
        for batch in range(rows, 0, -1):
            request = Request(batch, self._workload.longest_tokens, least)
            mask = BlockMask()
            for group in groups:
                if self._memory.peak_bytes(mask, request) <= least:
                    break
                mask |= BlockMask.of(*group)
            if self._memory.peak_bytes(mask, request) <= least:
                notes = {"mask": list(mask.names), "batch_size": batch,
                         "seq_len_tokens": request.seq_len_tokens}  # fmt: skip
                return System(name, StaticPolicy(mask, name), (), notes, mask)
        raise ExperimentError(
            f"No mask of {self._llm.name} fits one request of {self._workload.longest_tokens} "
            f"tokens into the minimum of the budget ({least:,} bytes); raise the budget's floor."
        )

    def _gsi_order(self) -> tuple[int, ...]:
        """Return the blocks in GSI order."""
        if self._config.replay.gsi is not None:
            from rap_env.importance.profiles import GSIProfile

            try:
                return GSIProfile.load(self._config.replay.gsi, self._llm).full_order
            except FileNotFoundError:
                raise ExperimentError(
                    f"There is no GSI artifact {self._config.replay.gsi}; measure one with "
                    "`python -m experiments.profile`."
                ) from None
        for policy in (self._trained, self._packaged):
            if isinstance(policy, NetworkPolicy) and policy.order:
                return policy.order
        raise ExperimentError(
            f"The policy {self._config.replay.policy} holds no GSI order; set replay.gsi to the "
            "gsi.json of `python -m experiments.profile`."
        )

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
