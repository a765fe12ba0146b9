"""The systems of a replay: what chooses masks in each, and what may be removed beyond that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import Config
from experiments.errors import ExperimentError
from experiments.replay.load import Load
from experiments.replay.policies import GreedyPolicy, OraclePolicy, Surroundings
from rap_env.artifacts import digest
from rap_env.blocks import BlockMask
from rap_env.memory import MemoryModel
from rap_env.policy import MaskPolicy
from rap_env.request import Request
from rap_env.runtime.policies import (
    DensePolicy,
    FrontierPolicy,
    NetworkPolicy,
    StaticPolicy,
    load_policy,
)
from rap_env.scoring.corpus import Corpus, CorpusConfig, load_corpus
from rap_env.scoring.scorer import MaskScorer

if TYPE_CHECKING:
    from experiments.replay.budgets import Budget
    from rap_env.llm.elastic import ElasticLLM


_OF_GSI = ("static_gsi", "static_gsi_lean")


@dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        name: As in ``replay.systems``.
        policy: What chooses masks.
        guard_order: Blocks that may be removed where the policy's mask does not fit, first to be
            removed first; None leaves that to the controller, and an empty one forbids it.
        notes: What else there is to know, for the records.
    """

    name: str
    policy: MaskPolicy
    guard_order: tuple[int, ...] | None
    notes: dict[str, Any] = field(default_factory=dict)


class SystemMaker:
    """Makes the systems of a replay.

    Args:
        config: All settings.
        llm: The live model.
        load: What is asked.
        budget: The budget.
    """

    def __init__(self, config: Config, llm: ElasticLLM, load: Load, budget: Budget) -> None:
        self._config = config
        self._llm = llm
        self._load = load
        self._budget = budget
        self._memory = MemoryModel(llm)

    def make(self, name: str, around: Surroundings) -> System:
        """A system by its name.

        Args:
            name: One of ``replay.systems``.
            around: For those that know more than a request.

        Raises:
            RapError: Its policy, table or order is missing, damaged, or of another model.
        """
        makers: dict[str, Callable[[], System]] = {
            "dense": lambda: System("dense", DensePolicy(), ()),
            "static_gsi": lambda: self._static("static_gsi", self._gsi_groups(), self._full),
            "static_gsi_lean": lambda: self._static("static_gsi_lean", self._gsi_groups(), 1),
            "static_shortgpt": lambda: self._static("static_shortgpt", self._layers(), self._full),
            "greedy": lambda: self._greedy(around),
            "frontier": lambda: System("frontier", self._frontier, self._guard_order),
            "rap": self._rap,
            "oracle": lambda: self._oracle(around),
        }
        return makers[name]()

    def check(self, names: Iterable[str]) -> None:
        """Find out before anything is run whether all systems can be made.

        Raises:
            RapError: One cannot be.
        """
        for name in names:
            if name == "rap":
                _ = self._trained
            if name in _OF_GSI:
                self._gsi_order()
            if name in ("frontier", "oracle"):
                _ = self._frontier

    def source_sha256(self, name: str) -> str | None:
        """Hash of the policy, table or order that a system gets from outside; None without any.

        Raises:
            RapError: As for `make`.
        """
        if name == "rap" and isinstance(self._trained, NetworkPolicy):
            arrays = self._trained.file.weights.arrays()
            weights = {name: array.tolist() for name, array in arrays.items()}
            return digest([weights, list(self._trained.order)])
        if name in ("frontier", "oracle"):
            return digest(self._frontier.frontier.scored)
        return digest(list(self._gsi_order())) if name in _OF_GSI else None

    @cached_property
    def _trained(self) -> MaskPolicy:
        return load_policy(self._config.replay.policy, self._memory)

    @cached_property
    def _frontier(self) -> FrontierPolicy:
        found = load_policy(self._config.replay.frontier, self._memory)
        if not isinstance(found, FrontierPolicy):
            raise ExperimentError(
                f"replay.frontier should be a frontier artifact (.json), but "
                f"{self._config.replay.frontier} is none; build one with "
                "`python -m experiments.profile frontier.evaluations=3000`."
            )
        return found

    @cached_property
    def _guard_order(self) -> tuple[int, ...] | None:
        """The GSI order, where there is one; else the controller takes what is largest."""
        try:
            return self._gsi_order()
        except (ExperimentError, OSError, ValueError):
            return None

    def _rap(self) -> System:
        order = getattr(self._trained, "order", ()) or self._guard_order
        return System("rap", self._trained, order)

    def _oracle(self, around: Surroundings) -> System:
        policy = OraclePolicy(self._frontier, self._budget, around)
        return System("oracle", policy, self._guard_order)

    def _greedy(self, around: Surroundings) -> System:
        tokens = self._calibration.tokens[:1, : self._config.replay.greedy_tokens]
        scorer = MaskScorer(self._llm, Corpus.of_tokens(tokens))
        policy = GreedyPolicy(self._memory, scorer, around)
        return System("greedy", policy, self._guard_order, {"text_tokens": tokens.numel()})

    @property
    def _full(self) -> int:
        """Rows of the batch that a static mask always has room for."""
        settings = self._config.replay
        return settings.static_batch or settings.max_batch_size

    def _gsi_groups(self) -> list[tuple[int, ...]]:
        return [(index,) for index in self._gsi_order()]

    def _static(self, name: str, groups: Sequence[tuple[int, ...]], rows: int) -> System:
        """The least pruned mask of an order that always fits.

        That is: the first groups of blocks, as many as it takes for so many rows of the longest
        request to fit the least budget of the run. Where even all of them do not suffice, the
        batch that counts is made smaller. With more rows nobody waits; with one the model is
        the largest that can still serve anybody at any time, and batches wait for room.
        """
        settings = self._config.replay
        least = self._budget.least(0.0, self._load.last_s + settings.queue_timeout_s)
        for batch in range(rows, 0, -1):
            request = Request(batch, self._load.longest_tokens, least)
            mask = BlockMask()
            for group in groups:
                if self._memory.peak_bytes(mask, request) <= least:
                    break
                mask |= BlockMask.of(*group)
            if self._memory.peak_bytes(mask, request) <= least:
                notes = {"mask": list(mask.names), "batch_size": batch,
                         "seq_len_tokens": request.seq_len_tokens}  # fmt: skip
                return System(name, StaticPolicy(mask, name), (), notes)
        raise ExperimentError(
            f"No mask of {self._llm.name} fits one request of {self._load.longest_tokens} tokens "
            f"into the least budget of the replay ({least:,} bytes); raise the budget's floor."
        )

    def _gsi_order(self) -> tuple[int, ...]:
        """Blocks in GSI order.

        Raises:
            ExperimentError: There is none.
        """
        if self._config.replay.gsi is not None:
            from rap_env.importance import GSIProfile

            try:
                return GSIProfile.load(self._config.replay.gsi, self._llm).full_order
            except FileNotFoundError:
                raise ExperimentError(
                    f"There is no GSI artifact {self._config.replay.gsi}; measure one with "
                    "`python -m experiments.profile`."
                ) from None
        policy = self._trained
        if isinstance(policy, NetworkPolicy) and policy.order:
            return policy.order
        raise ExperimentError(
            f"The policy {self._config.replay.policy} holds no GSI order; set replay.gsi to the "
            "gsi.json of `python -m experiments.profile`."
        )

    def _layers(self) -> list[tuple[int, ...]]:
        """Whole layers, that first which turns the hidden state least (ShortGPT)."""
        from rap_env.importance.layers import layer_influence

        scorer = MaskScorer(self._llm, self._calibration)
        influence = layer_influence(self._llm, scorer.batches)
        ranked = np.argsort(influence, kind="stable").tolist()
        return [(2 * layer, 2 * layer + 1) for layer in ranked]

    @cached_property
    def _calibration(self) -> Corpus:
        """The text on which whoever measures does so; no part of the prompts."""
        settings = self._config.calibration
        text = CorpusConfig(**asdict(settings))
        return load_corpus(text, self._llm, progress=self._config.progress)
