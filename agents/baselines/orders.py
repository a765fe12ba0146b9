"""Baselines that follow one order of blocks until the request fits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from agents.baselines.base import Baseline, price_per_byte
from agents.baselines.bench import Bench
from rap_env.blocks import BlockKind, BlockMask
from rap_env.costs import request_costs
from rap_env.errors import ArtifactError
from rap_env.request import Request


class OrderBaseline(Baseline):
    """Removes blocks in an order until the request fits."""

    def _choose(self, request: Request) -> tuple[BlockMask, int]:
        costs = request_costs(self.memory, request.batch_size, request.seq_len_tokens)
        return costs.remove_until_fits(self._order(request), request.budget_bytes), 0

    @abstractmethod
    def _order(self, request: Request) -> Sequence[int]:
        """Indices of blocks, first to be removed first."""


class RandomBaseline(OrderBaseline):
    """Removes blocks at random; the same seed and request give the same mask."""

    name = "random"
    seeded = True

    def _order(self, request: Request) -> Sequence[int]:
        key = [self.seed, request.batch_size, request.seq_len_tokens, request.budget_bytes]
        return _indices(np.random.default_rng(key).permutation(self.memory.facts.num_blocks))


class DenseBaseline(OrderBaseline):
    """Removes nothing; the reference that seldom fits."""

    name = "dense"
    kv_aware = False

    def _order(self, request: Request) -> Sequence[int]:
        return ()


class OneShotBaseline(OrderBaseline):
    """Removes first what alone costs the dense model least."""

    name = "one_shot"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._blocks = _ascending(context.one_shot.loss_rise)

    @property
    def setup_evaluations(self) -> int:
        """The dense model, and each block left out once."""
        return self.memory.facts.num_blocks + 1

    def _order(self, request: Request) -> Sequence[int]:
        return self._blocks


class OneShotPerByteBaseline(OneShotBaseline):
    """Removes first what alone costs the dense model least for each byte the request gets."""

    name = "one_shot_per_byte"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._loss_rise = np.asarray(context.one_shot.loss_rise, dtype=np.float64)

    def _order(self, request: Request) -> Sequence[int]:
        freed = self.memory.freed_bytes(request)
        prices = [price_per_byte(*pair) for pair in zip(self._loss_rise, freed, strict=True)]
        return _ascending(np.array(prices))


class _OneKindBaseline(OneShotBaseline):
    """The one-shot order within one kind of block; may end before the request fits."""

    kind: ClassVar[BlockKind]

    def _order(self, request: Request) -> Sequence[int]:
        kinds = {block.index: block.kind for block in self.memory.facts.blocks}
        return [index for index in self._blocks if kinds[index] == self.kind]


class AttentionOnlyBaseline(_OneKindBaseline):
    """Removes attention blocks only, in one-shot order."""

    name = "attention_only"
    kind = "attn"


class FFNOnlyBaseline(_OneKindBaseline):
    """Removes feed-forward blocks only, in one-shot order."""

    name = "ffn_only"
    kind = "ffn"


class BlockInfluenceBaseline(OrderBaseline):
    """Removes first what turns the hidden state least (ShortGPT, arXiv 2403.03853).

    Deviates from the paper in that an attention and an ffn block are ranked on their own and
    not as one layer.
    """

    name = "block_influence"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        self._blocks = _ascending(context.one_shot.block_influence)

    @property
    def setup_evaluations(self) -> int:
        """One pass of the dense model gives the influence of all blocks."""
        return 1

    def _order(self, request: Request) -> Sequence[int]:
        return self._blocks


class GSIBaseline(OrderBaseline):
    """Follows the GSI order until the request fits; after its end the last round's losses.

    Raises:
        ArtifactError: The context has no GSI order.
    """

    name = "gsi"

    def __init__(self, context: Bench, seed: int = 0) -> None:
        super().__init__(context, seed)
        if context.gsi is None:
            raise ArtifactError(
                "The baseline 'gsi' needs a GSI order, but this context has none; open it "
                "with importance='gsi' or with the path of a GSI artifact."
            )
        self._blocks = context.gsi.full_order
        self._setup_evaluations = context.gsi.evaluations

    @property
    def setup_evaluations(self) -> int:
        """Masks that were run to find the order."""
        return self._setup_evaluations

    def _order(self, request: Request) -> Sequence[int]:
        return self._blocks


def _ascending(values: npt.NDArray[np.float64]) -> list[int]:
    return _indices(np.argsort(values, kind="stable"))


def _indices(values: npt.NDArray[np.int64]) -> list[int]:
    return [int(value) for value in values]
