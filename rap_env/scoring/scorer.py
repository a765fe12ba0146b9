"""NLL of masks on a fixed text, with the blocks that masks share computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tqdm import tqdm

from rap_env.blocks import Block, BlockMask
from rap_env.errors import CorpusError, NonFiniteScoreError
from rap_env.llm.cpu_decode import attention_name
from rap_env.llm.device import device_kind
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.loss import HEAD_TOKENS, window_nll
from rap_env.scoring.mask_runner import MaskRunner, chunks
from rap_env.scoring.parts import TextParts
from rap_env.scoring.states import Node, StateCache, branch_nodes
from rap_env.scoring.store import ScoreStore, context_key
from rap_env.scoring.width import masks_at_once

METRIC = "window_nll"
"""Under what name the store has the scores of a text: one value for each window."""

_BATCH_TOKENS = 1024
_PREFIX_BYTES = 512 * 2**20
_LOSS_VERSION = 2  # raised when the same numbers are computed in another order


class MaskScorer:
    """Measures what masks do to the model's NLL on a text cut into windows.

    Each window of T tokens stands alone (stride T, nothing put before it) and gives T - 1
    predictions. Masks are ordered as a tree over blocks, and a mask starts where it departs
    from one that was run before. The result is bit for bit that of a whole pass, since the
    same operations run on the same tensors; on an accelerator, where several masks may share
    a batch, it is equal up to the dtype's rounding.

    Args:
        llm: The live model; its mask is restored after each call.
        text: A corpus, or token ids of shape (windows, T).
        store: Where scores are kept between runs; None keeps them in this object only.
        batch_tokens: Tokens of one forward pass; windows are batched up to it.
        prefix_cache_bytes: Most bytes of hidden states kept for sharing. Where they do not
            suffice for every step of a mask, every second (third, ...) step's are kept.
        masks_together: Most masks that share a batch; None is 1 on a CPU, and measured on
            an accelerator.

    Attributes:
        runner: Runs masks on the text and counts blocks.
        evaluations: Masks that were really run (stored ones don't count), those that a search
            dropped before the end included.
        full_block_forwards: Blocks that single full passes would have run for them.
        in_flight: Masks that advance through the model together.
        stride: Every so many steps the state of a mask is worth keeping.

    Raises:
        CorpusError: The windows are shorter than two tokens, or longer than the model's positions.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        text: Corpus | torch.Tensor,
        store: ScoreStore | None = None,
        *,
        batch_tokens: int = _BATCH_TOKENS,
        prefix_cache_bytes: int = _PREFIX_BYTES,
        masks_together: int | None = None,
    ) -> None:
        self.llm = llm
        self.corpus = text if isinstance(text, Corpus) else Corpus.of_tokens(text)
        self.store = store
        self.evaluations = 0
        self.full_block_forwards = 0
        tokens = self.corpus.tokens
        windows, length = tokens.shape
        if not 2 <= length <= llm.facts.max_positions:
            raise CorpusError(
                f"A window must have from 2 to {llm.facts.max_positions} tokens (the positions "
                f"of {llm.name}), not {length}."
            )
        rows = max(1, batch_tokens // length)
        batches = tuple(batch.to(llm.device) for batch in torch.split(tokens, rows))
        at_once = masks_at_once(llm, batches[0], prefix_cache_bytes, masks_together)
        self.in_flight = at_once.in_flight
        self.runner = MaskRunner(
            PartialForward(llm), batches, StateCache(at_once.cache_bytes), at_once.width
        )
        state_bytes = windows * length * llm.facts.hidden_size * llm.facts.itemsize
        path_bytes = len(self.runner.lows) * state_bytes
        self.stride = max(1, -(-path_bytes // max(1, at_once.cache_bytes)))
        self._scores: dict[BlockMask, npt.NDArray[np.float64]] = {}
        self._parts = TextParts(self, prefix_cache_bytes)
        self.context = self._make_context(rows)
        self._key = context_key(self.context)

    @property
    def batches(self) -> Sequence[torch.Tensor]:
        """The windows as they are run, each of shape (rows, T), on the model's device."""
        return self.runner.batches

    @property
    def block_forwards(self) -> float:
        """Blocks that were really run on the whole text; on a part of it, that part."""
        return self.runner.block_runs / len(self.batches) + self._parts.block_forwards

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return int(self.corpus.tokens.shape[0])

    @property
    def passes(self) -> float:
        """Masks that were really run; one run on a part of the text counts as that part."""
        return self.evaluations + self._parts.windows_run / self.num_windows

    @property
    def share_saved(self) -> float:
        """Share of the block forwards of single full passes that was not needed."""
        full = self.full_block_forwards + self._parts.full_block_forwards
        return 1 - self.block_forwards / max(1, full)

    @cached_property
    def evaluation_s(self) -> float:
        """Seconds that one pass of the dense model over the text takes, measured once."""
        alone = MaskRunner(self.runner.partial, self.batches, StateCache(0))
        began = time.perf_counter()
        self._values(alone, [0], keep=())
        return time.perf_counter() - began

    @property
    def known(self) -> int:
        """Masks asked for so far, stored ones included: what an empty store would have to run."""
        return len(self._scores)

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""
        return self.nll(BlockMask())

    def is_predicted(self, _mask: BlockMask) -> bool:
        """Whether the score of `mask` is a guess: never, since a live model measures it."""
        return False

    def nll(self, mask: BlockMask) -> float:
        """Mean NLL of the text under `mask`, nats per token.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        return float(self.window_nll(mask).mean())

    def window_nll(self, mask: BlockMask) -> npt.NDArray[np.float64]:
        """Mean NLL of each window under `mask`, nats per token, shape (windows,)."""
        if self.look_up(mask) is None:
            self._measure([mask], self._spine(mask))
        return self._scores[mask]

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order; what they share runs once.

        Args:
            masks: What to score; repeated ones are measured once.
            on_score: Called after each mask that is done, for progress bars.
        """
        known = [values for mask in masks if (values := self.look_up(mask)) is not None]
        if on_score is None and len(known) == len(masks):  # as mostly in a vector environment
            return [float(values.mean()) for values in known]
        distinct = sorted(set(masks), key=self._sharing_order)
        missing = [mask for mask in distinct if self.look_up(mask) is None]
        branches = branch_nodes([to_bits(mask) for mask in missing], self.runner.partial.steps)
        for group in chunks(missing, self.in_flight):
            last = group[-1] is missing[-1]
            self._measure(group, branches | self._spine(group[-1]) if last else branches)
            tick(on_score, group)
        tick(on_score, [mask for mask in distinct if mask not in missing])
        return [self.nll(mask) for mask in masks]

    def nll_on(self, masks: Sequence[BlockMask], windows: Sequence[int]) -> list[float]:
        """NLL of several masks on some windows of the text alone, nats per token.

        What is known of a mask on the whole text is used; of the others nothing is stored,
        since what a part of the text says is no score of it.

        Args:
            masks: What to score; repeated ones are measured once.
            windows: Numbers of the windows, at least one.
        """
        return self._parts.nll_many(masks, tuple(windows))

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL without that block too."""
        candidates = self.candidates(mask)
        nll = self.nll_many(list(candidates.values()), on_score)
        return dict(zip(candidates, nll, strict=True))

    def candidates(self, mask: BlockMask) -> dict[Block, BlockMask]:
        """For every block that `mask` keeps: the mask that removes it too."""
        kept = [block for block in self.llm.blocks if block not in mask]
        return {block: mask | BlockMask.of(block) for block in kept}

    def look_up(self, mask: BlockMask) -> npt.NDArray[np.float64] | None:
        """NLL of each window if it is known, shape (windows,), or None.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
        """
        if mask not in self._scores:
            mask.check(self.llm.facts.num_blocks)
            values = None if self.store is None else self.store.get(self._key, mask, METRIC)
            if values is None:
                return None
            self._scores[mask] = np.array(values)
        return self._scores[mask]

    def record(self, mask: BlockMask, values: npt.NDArray[np.float64]) -> None:
        """Keep what was measured of a mask: the NLL of each window, shape (windows,).

        Raises:
            NonFiniteScoreError: It is NaN or infinite; nothing is kept.
        """
        if not np.isfinite(values).all():
            self.refuse(mask)
        if self.store is not None:
            self.store.put(self._key, mask, METRIC, values.tolist(), self.context)
        self._scores[mask] = values

    def refuse(self, mask: BlockMask) -> NoReturn:
        """Say that the model gave no number for `mask`.

        Raises:
            NonFiniteScoreError: Always.
        """
        self.runner.cache.clear()  # what led there may be spoilt too
        raise NonFiniteScoreError(
            f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite NLL {mask}; check the "
            "weights, or load the model with dtype='float32'."
        )

    def count(self, mask: BlockMask) -> None:
        """Count a mask that is run."""
        self.evaluations += 1
        self.full_block_forwards += self.llm.facts.num_blocks - len(mask)

    def _sharing_order(self, mask: BlockMask) -> tuple[bool, ...]:
        return tuple(index in mask.indices for index in range(self.llm.facts.num_blocks))

    def _spine(self, mask: BlockMask) -> set[Node]:
        """The nodes of one mask that are kept for whichever mask comes next."""
        bits, lows = to_bits(mask), self.runner.lows
        return {(n, bits & low) for n, low in enumerate(lows) if n % self.stride == 0}

    def _measure(self, masks: Sequence[BlockMask], keep: Collection[Node]) -> None:
        values = self._values(self.runner, [to_bits(mask) for mask in masks], keep)
        for mask, row in zip(masks, values, strict=True):
            self.record(mask, row)
            self.count(mask)

    def _values(
        self, runner: MaskRunner, masks: Sequence[int], keep: Collection[Node]
    ) -> npt.NDArray[np.float64]:
        """Mean NLL of each window for each mask, (masks, windows); states of `keep` are kept."""
        parts = []
        with self.llm.masked(BlockMask()):
            for batch, ids in enumerate(runner.batches):
                last = runner.run(batch, masks, partial(_keep_some, runner.cache, keep, batch))
                hidden = (runner.partial.leave(last[mask]) for mask in masks)
                parts.append(torch.stack([window_nll(runner.partial, h, ids) for h in hidden]))
        values: npt.NDArray[np.float64] = torch.cat(parts, dim=1).cpu().numpy()
        return values

    def _make_context(self, rows: int) -> Mapping[str, Any]:
        """Everything that determines a score, down to the rounding of its last bit."""
        model = self.llm.model
        return {
            **self.llm.facts.identity,
            "device": device_kind(self.llm.device),
            "attention": attention_name(model),
            "tokens": self.corpus.sha256,
            "shape": list(self.corpus.tokens.shape),
            "batch_windows": rows,
            "head_tokens": HEAD_TOKENS,
            "loss": _LOSS_VERSION,
            "threads": torch.get_num_threads() if self.llm.device.type == "cpu" else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def to_bits(mask: BlockMask) -> int:
    """A mask as a number: bit i is set if block i is removed."""
    return sum(1 << index for index in mask.indices)


def tick(on_score: Callable[[BlockMask], None] | None, masks: Sequence[BlockMask]) -> None:
    """Say of each mask that it is done, if anybody asked."""
    if on_score is not None:
        for mask in masks:
            on_score(mask)


def _keep_some(
    cache: StateCache, keep: Collection[Node], batch: int, node: Node, state: torch.Tensor
) -> None:
    if node in keep:
        cache.put(batch, node, state)


def ticker(bar: tqdm[Any]) -> Callable[[BlockMask], None]:
    """A callback for `MaskScorer.nll_many` that moves a progress bar on."""

    def move_on(_mask: BlockMask) -> None:
        bar.update()

    return move_on
