"""Where the blocks of a model live and what its config says about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import nn

from rap_env.errors import UnsupportedModelError
from rap_env.llm.families import FAMILIES, Family
from rap_env.llm.removed import RemovedAttention, RemovedFFN
from rap_env.llm.sites import BlockSite, Slot


@dataclass(frozen=True)
class FamilyAdapter:
    """What the config of one model says about its blocks; needs no weights.

    Attributes:
        model_type: The family.
        config: The config of the decoder (of the text part, if there are several).
        family: Names of the family's modules.
    """

    model_type: str
    config: Any
    family: Family

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def num_blocks(self) -> int:
        """2L, an attn and an ffn block a layer."""
        return 2 * self.num_layers

    @property
    def parallel(self) -> bool:
        """Whether both blocks of a layer read the same state."""
        return self.family.parallel(self.config)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def ffn_width(self) -> int:
        """Widest hidden activation of a feed-forward block for one token, experts included."""
        return self.family.ffn_width(self.config)

    @property
    def vocab_size(self) -> int:
        """Entries of the head."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values that a token writes to each layer's cache."""
        heads = getattr(self.config, "num_key_value_heads", None)
        return int(heads or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Values in each of those heads."""
        size = getattr(self.config, "head_dim", None)
        return int(size or self.config.hidden_size // self.config.num_attention_heads)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in one layer.

        Args:
            itemsize: Bytes of one value in the cache.
        """
        return 2 * self.kv_heads * self.head_dim * itemsize

    @cached_property
    def kv_window_tokens(self) -> tuple[int | None, ...]:
        """Most tokens that each layer's cache holds between steps, None without limit, (L,).

        A layer with a sliding window of w tokens holds w - 1: the token at hand is the w-th.
        """
        from transformers import DynamicCache

        # The cache itself says which layers slide: families encode it in different ways.
        layers: list[Any] = DynamicCache(config=self.config).layers
        return tuple(
            layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
            for layer in layers
        )

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that turns token ids into the last hidden state.

        Raises:
            UnsupportedModelError: The model is no causal language model of this family.
        """
        try:
            return model.get_submodule(self.family.decoder)
        except AttributeError:
            raise UnsupportedModelError(
                f"A {self.model_type} model should have its decoder at {self.family.decoder!r}, "
                f"but {type(model).__name__} has not; load it with AutoModelForCausalLM."
            ) from None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in order.

        Raises:
            UnsupportedModelError: The model is no causal language model of this family.
        """
        return cast("nn.ModuleList", self.decoder(model).get_submodule(self.family.layers))

    def sites(self, model: nn.Module) -> tuple[BlockSite, ...]:
        """Where each block lives in a live model, in order of index, (2L,).

        Raises:
            UnsupportedModelError: The model is no causal language model of this family.
        """
        return tuple(
            BlockSite(2 * number + kind, tuple(slots))
            for number, layer in enumerate(self.layers(model))
            for kind, slots in enumerate((self._attn(layer, number), self._ffn(layer)))
        )

    def _attn(self, layer: nn.Module, number: int) -> Iterator[Slot]:
        yield _slot(layer, self.family.attn, RemovedAttention(number))
        for norm in self.family.attn_norms:
            yield _slot(layer, norm, nn.Identity())

    def _ffn(self, layer: nn.Module) -> Iterator[Slot]:
        *inner, last = self.family.ffn
        yield _slot(layer, last, RemovedFFN())
        for name in (*inner, *self.family.ffn_norms):
            yield _slot(layer, name, nn.Identity())


def _slot(layer: nn.Module, attribute: str, stand_in: nn.Module) -> Slot:
    return Slot(layer, attribute, layer.get_submodule(attribute), stand_in)


def adapter_for(config: Any) -> FamilyAdapter:
    """The adapter for a model's config; nothing of the model itself is loaded.

    Args:
        config: A transformers config of a causal language model.

    Raises:
        UnsupportedModelError: The family is unknown, or this config of a known one has a
            layout that cannot be masked.
    """
    model_type = str(config.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"The blocks of model type {model_type!r} are not known; known are "
            f"{', '.join(sorted(FAMILIES))}. To add one, describe where its blocks live in "
            "FAMILIES of rap_env/llm/families.py (its first lines say how)."
        )
    decoder_config = config.get_text_config(decoder=True)
    family.check(decoder_config)
    return FamilyAdapter(model_type, decoder_config, family)
