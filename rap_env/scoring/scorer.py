"""Mean NLL of masks on a fixed text; blocks that several masks share are computed once."""

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
from rap_env.scoring.batch_width import choose_batch_width
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.mask_runner import MaskRunner, Node, StateCache, branch_nodes, chunks
from rap_env.scoring.nll import HEAD_TOKENS, window_nll
from rap_env.scoring.store import ScoreStore, context_key

METRIC = "window_nll"
"""The store's metric for the scores of a text: one value per window."""

_BATCH_TOKENS = 1024
_PREFIX_BYTES = 512 * 2**20
_LOSS_VERSION = 2  # raised when the same numbers are computed in another order


class MaskScorer:
    """Measures the model's NLL under masks, on a text cut into windows.

    Each window of T tokens is scored on its own (stride T, no context before it) and gives
    T - 1 predictions. Masks run in the order of a prefix tree over blocks: each mask starts at
    the last state that it shares with a mask that ran before. The result equals that of a whole
    pass bit for bit, because the same operations run on the same tensors. On an accelerator,
    where several masks may share a batch, it is equal up to the dtype's rounding.

    Args:
        llm: The live model; its mask is restored after each call.
        text: A corpus, or token ids of shape (windows, T).
        store: Keeps scores between runs; None keeps them in this object only.
        batch_tokens: Tokens of one forward pass; windows are batched up to this number.
        prefix_cache_bytes: Most bytes of hidden states kept for sharing. If they do not suffice
            for every step of a mask, the states of every second (third, ...) step are kept.
        masks_together: Most masks that share a batch; None is 1 on a CPU, and measured on
            an accelerator.

    Attributes:
        runner: Runs masks on the text and counts blocks.
        evaluations: Masks that the model ran, including those that a search dropped before
            the end; masks found in the store do not count.
        full_block_forwards: Blocks that single full passes would have run for these masks.
        in_flight: Masks that advance through the model together.
        stride: The states of every `stride`-th step of a mask are kept.

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
        width = choose_batch_width(llm, batches[0], prefix_cache_bytes, masks_together)
        self.in_flight = width.in_flight
        partial_forward, cache = PartialForward(llm), StateCache(width.cache_bytes)
        self.runner = MaskRunner(partial_forward, batches, cache, width.masks)
        state_bytes = windows * length * llm.facts.hidden_size * llm.facts.itemsize
        path_bytes = len(partial_forward.steps) * state_bytes
        self.stride = max(1, -(-path_bytes // max(1, width.cache_bytes)))
        self._scores: dict[BlockMask, npt.NDArray[np.float64]] = {}
        self._prefix_cache_bytes = prefix_cache_bytes
        self._parts: dict[tuple[int, ...], MaskScorer] = {}  # by the numbers of their windows
        self._part_windows = 0  # windows that parts ran, summed over masks
        self.context: Mapping[str, Any] = {
            **model_context(llm),
            "tokens": self.corpus.sha256,
            "shape": list(tokens.shape),
            "batch_windows": rows,
            "head_tokens": HEAD_TOKENS,
            "loss": _LOSS_VERSION,
        }
        self._key = context_key(self.context)

    @property
    def batches(self) -> Sequence[torch.Tensor]:
        """The windows as the model runs them, each of shape (rows, T), on the model's device."""
        return self.runner.batches

    @property
    def block_forwards(self) -> float:
        """Blocks that the model ran, in passes over the whole text; parts count by their share."""
        parts = sum(part.block_forwards * self._share(part) for part in self._parts.values())
        return self.runner.block_runs / len(self.batches) + parts

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, text and everything else that determines the scores, for artifacts."""
        facts = self.llm.facts
        return {
            "model": facts.name,
            "fingerprint": facts.fingerprint,
            "text": self.corpus.provenance,
            "scoring": dict(self.context),
        }

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return int(self.corpus.tokens.shape[0])

    @property
    def passes(self) -> float:
        """Masks that the model ran; a mask run on a part of the text counts as that part."""
        return self.evaluations + self._part_windows / self.num_windows

    @property
    def share_saved(self) -> float:
        """Share of the block forwards of single full passes that sharing saved."""
        parts = sum(part.full_block_forwards * self._share(part) for part in self._parts.values())
        return 1 - self.block_forwards / max(1, self.full_block_forwards + parts)

    @cached_property
    def evaluation_s(self) -> float:
        """Seconds that one pass of the dense model over the text takes, measured once."""
        alone = MaskRunner(self.runner.partial, self.batches, StateCache(0))
        began = time.perf_counter()
        self._values(alone, [BlockMask()], keep=())
        return time.perf_counter() - began

    @property
    def known(self) -> int:
        """Masks asked for so far, including stored ones: what an empty store would have to run."""
        return len(self._scores)

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""
        return self.nll(BlockMask())

    def is_predicted(self, _mask: BlockMask) -> bool:
        """Whether the score of `mask` is predicted: never, because a live model measures it."""
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
            self._measure([mask], self._path(mask))
        return self._scores[mask]

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order; steps that they share run once.

        Args:
            masks: Masks to score; repeated masks are measured once.
            on_score: Called after each finished mask, for progress bars.
        """
        known = [values for mask in masks if (values := self.look_up(mask)) is not None]
        if on_score is None and len(known) == len(masks):  # the common case in a vector environment
            return [float(values.mean()) for values in known]
        distinct = sorted(set(masks), key=self._sharing_order)
        missing = [mask for mask in distinct if self.look_up(mask) is None]
        branches = branch_nodes(missing, self.runner.partial.steps)
        for group in chunks(missing, self.in_flight):
            last = group[-1] is missing[-1]
            self._measure(group, branches | self._path(group[-1]) if last else branches)
            notify(on_score, group)
        notify(on_score, [mask for mask in distinct if mask not in missing])
        return [self.nll(mask) for mask in masks]

    def nll_on(self, masks: Sequence[BlockMask], windows: Sequence[int]) -> list[float]:
        """NLL of several masks on some windows of the text only, nats per token.

        A mask that is known on the whole text is not run again. Nothing is stored for the other
        masks, because the NLL of a part is not a score of the text.

        Args:
            masks: Masks to score; repeated masks are measured once.
            windows: Numbers of the windows, at least one.
        """
        chosen = tuple(windows)
        known = {mask: self.look_up(mask) for mask in masks}
        nll = {m: float(v[list(chosen)].mean()) for m, v in known.items() if v is not None}
        missing = [mask for mask in known if mask not in nll]
        if missing:
            part = self._part(chosen)
            ran = part.evaluations
            nll |= dict(zip(missing, part.nll_many(missing), strict=True))
            self._part_windows += (part.evaluations - ran) * len(chosen)
        return [nll[mask] for mask in masks]

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL if that block is removed too."""
        candidates = self.candidates(mask)
        nll = self.nll_many(list(candidates.values()), on_score)
        return dict(zip(candidates, nll, strict=True))

    def candidates(self, mask: BlockMask) -> dict[Block, BlockMask]:
        """For every block that `mask` keeps: the mask that also removes it."""
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
        """Store the measured NLL of each window under a mask, shape (windows,).

        Raises:
            NonFiniteScoreError: A value is NaN or infinite; nothing is stored.
        """
        if not np.isfinite(values).all():
            self.raise_non_finite(mask)
        if self.store is not None:
            self.store.put(self._key, mask, METRIC, values.tolist(), self.context)
        self._scores[mask] = values

    def raise_non_finite(self, mask: BlockMask) -> NoReturn:
        """Raise a `NonFiniteScoreError`: the model gave NaN or infinity under `mask`."""
        self.runner.cache.clear()  # the states on the way may be non-finite too
        raise NonFiniteScoreError(
            f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite NLL {mask}; check the "
            "weights, or load the model with dtype='float32'."
        )

    def count(self, mask: BlockMask) -> None:
        """Count a mask that the model ran."""
        self.evaluations += 1
        self.full_block_forwards += self.llm.facts.num_blocks - len(mask)

    def _sharing_order(self, mask: BlockMask) -> tuple[bool, ...]:
        return tuple(index in mask.indices for index in range(self.llm.facts.num_blocks))

    def _path(self, mask: BlockMask) -> set[Node]:
        """The nodes of one mask that are kept for the masks of later calls."""
        return set(list(enumerate(self.runner.prefixes(mask)[:-1]))[:: self.stride])

    def _part(self, windows: tuple[int, ...]) -> MaskScorer:
        """The scorer of some windows, kept: a mask that was measured there is known."""
        if windows not in self._parts:
            share = len(windows) / self.num_windows
            self._parts[windows] = type(self)(
                self.llm,
                self.corpus.tokens[list(windows)],
                batch_tokens=self.batches[0].numel(),
                prefix_cache_bytes=int(self._prefix_cache_bytes * share),
                masks_together=self.runner.width,
            )
        return self._parts[windows]

    def _share(self, part: MaskScorer) -> float:
        return part.num_windows / self.num_windows

    def _measure(self, masks: Sequence[BlockMask], keep: Collection[Node]) -> None:
        values = self._values(self.runner, masks, keep)
        for mask, row in zip(masks, values, strict=True):
            self.record(mask, row)
            self.count(mask)

    def _values(
        self, runner: MaskRunner, masks: Sequence[BlockMask], keep: Collection[Node]
    ) -> npt.NDArray[np.float64]:
        """Mean NLL of each window for each mask, (masks, windows); caches the states of `keep`."""
        parts = []
        with self.llm.masked(BlockMask()):
            for batch, ids in enumerate(runner.batches):
                last = runner.run(batch, masks, partial(_keep_some, runner.cache, keep, batch))
                hidden = (runner.partial.leave(last[mask]) for mask in masks)
                parts.append(torch.stack([window_nll(runner.partial, h, ids) for h in hidden]))
        values: npt.NDArray[np.float64] = torch.cat(parts, dim=1).cpu().numpy()
        return values


def model_context(llm: ElasticLLM) -> dict[str, Any]:
    """What determines any score of a model, including the rounding of its last bit."""
    return {
        **llm.facts.identity,
        "device": device_kind(llm.device),
        "attention": attention_name(llm.model),
        "threads": torch.get_num_threads() if llm.device.type == "cpu" else 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def notify(on_score: Callable[[BlockMask], None] | None, masks: Sequence[BlockMask]) -> None:
    """Call `on_score`, if there is one, for each mask."""
    if on_score is not None:
        for mask in masks:
            on_score(mask)


def _keep_some(
    cache: StateCache, keep: Collection[Node], batch: int, node: Node, state: torch.Tensor
) -> None:
    if node in keep:
        cache.put(batch, node, state)


def bar_callback(bar: tqdm[Any]) -> Callable[[BlockMask], None]:
    """A callback for `MaskScorer.nll_many` that advances a progress bar."""

    def advance(_mask: BlockMask) -> None:
        bar.update()

    return advance
