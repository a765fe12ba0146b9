"""A live model whose blocks can be taken out and put back, exactly."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rap_env.blocks import Block, BlockMask
from rap_env.llm.adapter import adapter_for
from rap_env.llm.device import return_freed_memory
from rap_env.llm.fingerprint import fingerprint_of, named_weights, tensor_key
from rap_env.llm.residency import (
    BlockWeights,
    Residency,
    check_residency,
    untied_parameters,
)
from rap_env.llm.sites import HeldBytes, LiveBlocks
from rap_env.llm.stub import Stub
from rap_env.memory import ModelFacts

if TYPE_CHECKING:
    from rap_env.llm.live import Restore


class ElasticLLM:
    """A causal language model with a mask of removed blocks.

    A removed block's modules are swapped for ones without weights and without work; this
    object keeps the originals, so that any mask can be undone exactly. The weights stay
    in memory and are never written to. While a mask is applied, `model` is what the mask
    leaves: its `state_dict()` and `parameters()` show the kept blocks alone, so lift the mask
    before you move, convert or save `model` as a whole.

    Generation with a KV cache is exact under any mask, and `apply` may change it between any two
    steps, from any thread: see `generate`, `rap_env.llm.live_batch.LiveBatch` and
    `set_residency`. Two things differ from a dense model: ``output_attentions`` and
    ``output_router_logits`` list the kept blocks alone, and a removed attention block leaves 2
    bytes a token and sequence in the cache (see `RemovedAttention`). Whoever calls `model`
    by hand while another thread changes masks holds `exclusive` meanwhile.

    Args:
        model: A causal language model of a known family. It is put into evaluation mode.
        tokenizer: Its tokenizer, or None where only token ids are used.
        name: What the user called the model.
        folder: Where its weights were read from, if from safetensors files.

    Attributes:
        model: The live model, as the current mask leaves it.
        tokenizer: As given.
        name: As given.
        folder: As given.
        adapter: What the config says about the blocks.

    Raises:
        UnsupportedModelError: The family is unknown or its layout cannot be masked.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, folder: Path | None = None
    ) -> None:
        self.adapter = adapter_for(model.config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        self._live = LiveBlocks(self.adapter.sites(model))
        self._stubs: Mapping[int, Stub] = {}
        self._repair = ""
        self._whole: ElasticLLM | None = None  # what a view was made of, which it keeps alive

    @property
    def num_blocks(self) -> int:
        """2L, an attn and an ffn block a layer."""
        return self.adapter.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the model's first weight lies."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of activations and KV cache."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def mask(self) -> BlockMask:
        """The mask that is applied now."""
        return BlockMask(frozenset(self._live.removed))

    @cached_property
    def pruned(self) -> BlockMask:
        """Blocks that the model was built without (`load_pruned`); no mask brings them back."""
        return BlockMask(frozenset(site.index for site in self._live.sites if site.gone))

    def repaired(self, stubs: Mapping[int, Stub], digest: str) -> ElasticLLM:
        """This model as seen by those who want stubs in the places of removed blocks.

        It shares the weights and the applied mask with this one, and nothing is changed until
        one of the two applies a mask. `rap_env.repair.StubLibrary.attach` checks that stubs
        belong to the model; use that.

        Args:
            stubs: By index of the block that they stand for, on the model's device and in its
                dtype. Blocks without one leave nothing behind.
            digest: Hash of the stubs; scores depend on it.
        """
        view = copy.copy(self)
        view.__dict__.pop("facts", None)
        view._stubs, view._repair, view._whole = dict(stubs), digest, self
        return view

    def has_stub(self, blocks: Iterable[int]) -> bool:
        """Whether something stands in the place of one of these blocks once it is removed."""
        return any(index in self._stubs for index in blocks)

    def apply(self, mask: BlockMask, *, bare: BlockMask = BlockMask()) -> None:
        """Remove exactly the blocks of `mask`; all others are put back.

        It waits for the step that another thread may be in. Then keys and values of removed
        blocks are freed in every cache that a generation uses, and their weights are let go of as
        `set_residency` says, before others are brought back. Caches take up restored
        blocks at their own next step.

        Args:
            mask: The blocks to remove.
            bare: Those among them in whose place no stub stands, whether or not there is one.

        Raises:
            UnknownNameError: It names a block that the model does not have; nothing changes.
            UnsupportedCacheError: A cache in use cannot let go of a block; nothing changes.
            ChecksumError: A restored block's file is damaged; blocks not yet restored stay removed.
            ModelNotAvailableError: The same, with a file that is gone.
        """
        with self.exclusive():
            wanted = self._wanted(mask, bare)
            self._live.free_keys_and_values(mask)
            self._live.place(wanted, let_go=True)

    @contextlib.contextmanager
    def masked(
        self,
        mask: BlockMask,
        *,
        bare: BlockMask = BlockMask(),
    ) -> Iterator[ElasticLLM]:
        """Apply `mask` for the duration of a ``with`` block, whatever happens in it.

        What was removed before is removed again afterwards. Other threads neither run the model nor
        change its mask meanwhile. Weights of blocks that are removed for this long stay in memory.

        Args:
            mask: As for `apply`.
            bare: As for `apply`.

        Raises:
            UnknownNameError: It names a block that the model does not have.
        """
        with self.exclusive():
            before = dict(self._live.removed)
            try:
                self._live.place(self._wanted(mask, bare))
                yield self
            finally:
                self._live.place(before, let_go=True)

    def exclusive(self) -> AbstractContextManager[object]:
        """While this ``with`` block lasts, no other thread runs the model or changes its mask.

        It may be nested. `apply`, `masked` and each step of a generation do it themselves.
        """
        return self._live.lock

    @contextlib.contextmanager
    def without(self, blocks: AbstractSet[int]) -> Iterator[None]:
        """Run without some more blocks than the mask removes, for the length of one step."""
        before = dict(self._live.removed)
        more = blocks - before.keys() - self.pruned.indices
        if not more:
            yield
            return
        try:
            self._live.place({**{index: self._stubs.get(index) for index in more}, **before})
            yield
        finally:
            self._live.place(before)

    @property
    def residency(self) -> Residency:
        """What becomes of the weights of removed blocks; see `rap_env.llm.residency`."""
        return "resident" if self._live.weights is None else self._live.weights.residency

    def set_residency(self, residency: Residency) -> None:
        """Say what becomes of the weights of removed blocks, those removed now included.

        The first time that weights are not to stay, every block's weights move to a buffer of
        their own, and it is checked where they can be read again: seconds for a GB.

        Args:
            residency: ``"resident"``, ``"offload"`` or ``"drop"``.

        Raises:
            UnknownNameError: There is no such residency.
            UnsupportedModelError: ``"drop"`` without the model's own files.
            StorageFullError: No room for a file to offload to.
        """
        check_residency(residency)
        with self.exclusive():
            if residency == self.residency:
                return
            removed = dict(self._live.removed)
            self._live.place({})  # all weights in memory
            self._live.weights = None
            try:
                if residency != "resident":
                    self._live.weights = BlockWeights(
                        *untied_parameters(self.model, self._live.sites),
                        self.device,
                        self.folder,
                        residency,
                        self.fingerprint,
                    )
            finally:
                self._live.place(removed, let_go=True)
        return_freed_memory()

    @property
    def held_bytes(self) -> HeldBytes:
        """Bytes that the model's tensors and the KV caches in use take in memory now."""
        with self.exclusive():
            own, base = self._own_bytes
            released = 0 if self._live.weights is None else self._live.weights.released_bytes
            weights = base + sum(own) - released + sum(self._stub_bytes())
            return HeldBytes(weights, self._live.kv_bytes())

    def watch(self, cache: Any) -> None:
        """Let a KV cache follow the masks that `apply` sets, for as long as somebody uses it."""
        self._live.caches.add(cache)

    @property
    def removed_attention(self) -> frozenset[int]:
        """Layers without their attention block now."""
        return frozenset(index // 2 for index in self._live.removed if index % 2 == 0) | frozenset(
            index // 2 for index in self.pruned.indices if index % 2 == 0
        )

    def _wanted(self, mask: BlockMask, bare: BlockMask) -> dict[int, Stub | None]:
        mask.check(self.num_blocks)
        return {
            index: None if index in bare.indices else self._stubs.get(index)
            for index in mask.indices
        }

    @property
    def spare_bytes(self) -> int | None:
        """Bytes left for hidden states where memory is capped; None: nothing caps it."""
        return None

    def hold_layer(self, number: int) -> None:
        """Have the weights of a layer in memory before it is called; here they always are."""

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the decoder gives under the current mask, (B, T) -> (B, T, H), with gradients.

        Sequences have no padding.
        """
        with self.exclusive():
            output = self.adapter.decoder(self.model)(input_ids=input_ids, use_cache=False)
        last: torch.Tensor = output.last_hidden_state
        return last

    def generate(
        self,
        *args: Any,
        restore: Restore = "refill",
        before_step: Callable[[], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` without gradients, under masks that may change between its steps.

        Several threads may generate at once: their steps take turns.

        Args:
            *args: As for transformers' ``generate``.
            restore: What an attention block that comes back does about the tokens so far:
                ``"refill"`` or ``"next_request"``; see `rap_env.llm.live`.
            before_step: Called before each forward pass; it may apply another mask.
            **kwargs: As for transformers' ``generate``.

        Raises:
            UnknownNameError: There is no such way of restoring.
            UnsupportedCacheError: The mask changed, and the cache or the way of decoding cannot
                follow. Also raised to who applies a mask that such a cache would have to follow.
        """
        from rap_env.llm.generation import generate
        from rap_env.llm.live import check_restore

        check_restore(restore)
        with torch.no_grad():
            return generate(self, restore, before_step, args, kwargs)

    @cached_property
    def _own_bytes(self) -> tuple[tuple[int, ...], int]:
        """Bytes of each block's own tensors, (2L,), and bytes of all else."""
        with self.masked(BlockMask()):
            everywhere = [tensor_key(tensor) for _, tensor in named_weights(self.model)]
            seen = Counter(everywhere)
            own = []
            for site in self._live.sites:
                inside = Counter(
                    tensor_key(t) for part in site.modules for _, t in named_weights(part)
                )
                # A tensor that also serves elsewhere (tied) is not freed with the block.
                own.append(sum(key[-1] for key, n in inside.items() if n == seen[key]))
        return tuple(own), sum(key[-1] for key in seen) - sum(own)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order of index."""
        return tuple(Block(i, n) for i, n in enumerate(self._own_bytes[0]))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and every weight (name, dtype, shape, bytes), in hex.

        Computed once, at about a second for a GB, and not again if somebody changes the weights.
        Independent of the mask, of the device and of where the model was loaded from.
        """
        with self.masked(BlockMask()):
            return fingerprint_of(self.model, self._read)

    def _stub_bytes(self) -> tuple[int, ...]:
        if not self._stubs:
            return ()
        stubs = (self._stubs.get(index) for index in range(self.num_blocks))
        return tuple(0 if stub is None else stub.nbytes for stub in stubs)

    def _read(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The content of a weight of the model."""
        return tensor

    @cached_property
    def facts(self) -> ModelFacts:
        """All that the memory arithmetic needs to know of the unmasked model."""
        adapter = self.adapter
        per_token = adapter.kv_bytes_per_token(self.dtype.itemsize)
        own, base = self._own_bytes
        return ModelFacts(
            name=self.name,
            fingerprint=self.fingerprint,
            dtype=str(self.dtype).removeprefix("torch."),
            block_param_bytes=own,
            base_bytes=base,
            kv_bytes_per_token=tuple(
                0 if 2 * layer in self.pruned else per_token for layer in range(adapter.num_layers)
            ),
            kv_window_tokens=adapter.kv_window_tokens,
            itemsize=self.dtype.itemsize,
            hidden_size=adapter.hidden_size,
            ffn_width=adapter.ffn_width,
            vocab_size=adapter.vocab_size,
            max_positions=adapter.max_positions,
            stub_bytes=self._stub_bytes(),
            repair=self._repair,
        )
