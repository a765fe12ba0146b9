"""NLL of masks on a fixed text, with the layers that masks share computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tqdm import tqdm

from rap_env.blocks import Block, BlockMask
from rap_env.errors import CorpusError, NonFiniteScoreError
from rap_env.llm.device import device_kind
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial import PartialForward
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.store import ScoreStore, context_key

_METRIC = "window_nll"
_BATCH_TOKENS = 1024
_HEAD_TOKENS = 256  # logits of so many tokens exist at once
_LOSS_ROWS = 64
_PREFIX_BYTES = 512 * 2**20

States = list[dict[int, torch.Tensor]]  # for each batch of windows: layer -> what enters it


class MaskScorer:
    """Measures what masks do to the model's NLL on a text cut into windows.

    Each window of T tokens stands alone (stride T, nothing put before it) and gives T - 1
    predictions. Masks are visited in an order in which neighbours share as many of the first
    layers as possible, and a mask starts where it departs from the one before. The result is
    bit for bit that of a whole pass, since the same operations run on the same tensors.

    Args:
        llm: The live model; its mask is restored after each call.
        text: A corpus, or token ids of shape (windows, T).
        store: Where scores are kept between runs; None keeps them in this object only.
        batch_tokens: Tokens of one forward pass; windows are batched up to it.
        prefix_cache_bytes: Most bytes of hidden states kept for sharing. Where they do not
            suffice for every layer, every second (third, ...) layer's are kept.

    Attributes:
        evaluations: Masks that were really run (stored ones don't count).
        block_forwards: Blocks that were really run on the whole text.

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
    ) -> None:
        self.llm = llm
        self.corpus = text if isinstance(text, Corpus) else Corpus.of_tokens(text)
        self.store = store
        self.evaluations = 0
        self.block_forwards = 0
        tokens = self.corpus.tokens
        windows, length = tokens.shape
        if not 2 <= length <= llm.facts.max_positions:
            raise CorpusError(
                f"A window must have from 2 to {llm.facts.max_positions} tokens (the positions "
                f"of {llm.name}), not {length}."
            )
        rows = max(1, batch_tokens // length)
        self._batches = tuple(batch.to(llm.device) for batch in torch.split(tokens, rows))
        self._partial = PartialForward(llm)
        layer_bytes = windows * length * llm.facts.hidden_size * llm.facts.itemsize
        self._stride = max(1, -(-llm.facts.num_layers * layer_bytes // prefix_cache_bytes))
        self._scores: dict[BlockMask, npt.NDArray[np.float64]] = {}
        self._path: BlockMask | None = None  # the mask whose states are kept
        self._states: States = [{} for _ in self._batches]
        self.context = self._make_context(rows)
        self._key = context_key(self.context)

    @property
    def batches(self) -> tuple[torch.Tensor, ...]:
        """The windows as they are run, each of shape (rows, T), on the model's device."""
        return self._batches

    @cached_property
    def evaluation_s(self) -> float:
        """Seconds that one pass of the dense model over the text takes, measured once."""
        began = time.perf_counter()
        self._run(BlockMask(), 0)
        return time.perf_counter() - began

    @property
    def known(self) -> int:
        """Masks asked for so far, stored ones included: what an empty store would have to run."""
        return len(self._scores)

    @property
    def dense_nll(self) -> float:
        """NLL of the dense model, nats per token."""
        return self.nll(BlockMask())

    def nll(self, mask: BlockMask) -> float:
        """Mean NLL of the text under `mask`, nats per token.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        return float(self.window_nll(mask).mean())

    def window_nll(self, mask: BlockMask) -> npt.NDArray[np.float64]:
        """Mean NLL of each window under `mask`, nats per token, shape (windows,)."""
        mask.check(self.llm.facts.num_blocks)
        found = self._look_up(mask)
        return self._measure(mask) if found is None else found

    def nll_many(
        self, masks: Sequence[BlockMask], on_score: Callable[[BlockMask], None] | None = None
    ) -> list[float]:
        """NLL of several masks, in their order; shared first layers run once.

        Args:
            masks: What to score; repeated ones are measured once.
            on_score: Called after each mask that is done, for progress bars.
        """
        for mask in sorted(set(masks), key=self._sharing_order):
            self.window_nll(mask)
            if on_score is not None:
                on_score(mask)
        return [self.nll(mask) for mask in masks]

    def scan(
        self, mask: BlockMask, on_score: Callable[[BlockMask], None] | None = None
    ) -> dict[Block, float]:
        """For every block that `mask` keeps: the NLL without that block too."""
        blocks = [block for block in self.llm.blocks if block not in mask]
        candidates = [mask | BlockMask.of(block) for block in blocks]
        return dict(zip(blocks, self.nll_many(candidates, on_score), strict=True))

    def _sharing_order(self, mask: BlockMask) -> tuple[bool, ...]:
        return tuple(index in mask.indices for index in range(self.llm.facts.num_blocks))

    def _look_up(self, mask: BlockMask) -> npt.NDArray[np.float64] | None:
        if mask not in self._scores and self.store is not None:
            values = self.store.get(self._key, mask, _METRIC)
            if values is not None:
                self._scores[mask] = np.array(values)
        return self._scores.get(mask)

    def _measure(self, mask: BlockMask) -> npt.NDArray[np.float64]:
        start = self._shared_layers(mask)
        values = self._run(mask, start)
        if not np.isfinite(values).all():
            raise NonFiniteScoreError(
                f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite NLL {mask}; check the "
                "weights, or load the model with dtype='float32'."
            )
        self.evaluations += 1
        self.block_forwards += sum(
            index not in mask.indices for index in range(2 * start, self.llm.facts.num_blocks)
        )
        if self.store is not None:
            self.store.put(self._key, mask, _METRIC, values.tolist(), self.context)
        self._scores[mask] = values
        return values

    def _run(self, mask: BlockMask, start: int) -> npt.NDArray[np.float64]:
        """Mean NLL of each window under `mask`, layers before `start` taken from the last mask."""
        self._path = None  # states are of no mask while they change
        with self.llm.masked(mask):
            parts = [self._run_batch(i, start) for i in range(len(self._batches))]
        self._path = mask
        return torch.cat(parts).double().cpu().numpy()

    def _shared_layers(self, mask: BlockMask) -> int:
        """First layer to compute: all before it equal those of the mask run last."""
        if self._path is None:
            return 0
        departs = min(mask.indices ^ self._path.indices, default=self.llm.facts.num_blocks) // 2
        return departs - departs % self._stride

    def _run_batch(self, number: int, start: int) -> torch.Tensor:
        states = self._states[number]
        for layer in [layer for layer in states if layer > start]:
            del states[layer]
        tokens = self._batches[number]
        hidden, new = self._partial.run(tokens, start, states.get(start))
        states.update((k, v) for k, v in new.items() if k % self._stride == 0)
        return self._window_means(hidden, tokens)

    @torch.inference_mode()
    def _window_means(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mean NLL of each window, shape (windows of the batch,); few logits exist at once."""
        inputs, targets = hidden[:, :-1], tokens[:, 1:]
        flat, wanted = inputs.reshape(1, -1, inputs.shape[-1]), targets.reshape(-1)
        losses = [
            token_nll(self._partial.logits(part)[0], target)
            for part, target in zip(
                torch.split(flat, _HEAD_TOKENS, dim=1),
                torch.split(wanted, _HEAD_TOKENS),
                strict=True,
            )
        ]
        return torch.cat(losses).view(targets.shape).double().mean(dim=1)

    def _make_context(self, rows: int) -> Mapping[str, Any]:
        """Everything that determines a score, down to the rounding of its last bit."""
        model = self.llm.model
        return {
            "model": self.llm.facts.fingerprint,
            "dtype": self.llm.facts.dtype,
            "device": device_kind(self.llm.device),
            "attention": str(getattr(model.config, "_attn_implementation", "")),
            "tokens": self.corpus.sha256,
            "shape": list(self.corpus.tokens.shape),
            "batch_windows": rows,
            "head_tokens": _HEAD_TOKENS,
            "threads": torch.get_num_threads() if self.llm.device.type == "cpu" else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL of each target in float32, (N, V) and (N,) -> (N,).

    In place and a few rows at a time: what stays in the processor's cache is twice as fast as
    `torch.nn.functional.cross_entropy`, and no second (N, V) tensor exists.
    """
    losses = []
    for rows, wanted in zip(
        torch.split(logits, _LOSS_ROWS), torch.split(targets, _LOSS_ROWS), strict=True
    ):
        shifted = rows.to(torch.float32, copy=True)
        shifted -= shifted.amax(dim=-1, keepdim=True)
        target = shifted.gather(1, wanted[:, None])[:, 0]
        losses.append(shifted.exp_().sum(dim=-1).log_() - target)
    return torch.cat(losses)


def ticker(bar: tqdm[Any]) -> Callable[[BlockMask], None]:
    """A callback for `MaskScorer.nll_many` that moves a progress bar on."""

    def tick(_mask: BlockMask) -> None:
        bar.update()

    return tick
