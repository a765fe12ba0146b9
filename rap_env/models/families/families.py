"""The supported decoder families: where the blocks are in a model, and what its config states.

To add a family, add a `Family` to `FAMILIES` under its ``config.model_type``. Two conditions
must hold: each decoder layer adds its attention and feed-forward outputs to the residual
stream *outside* these modules, so that an output of zeros has no effect; and there is no
biased norm between a block's output and that sum. A norm that both blocks use (one norm in
front of a parallel layer) belongs to neither: list only norms that a single block uses. Then
add a two-layer model to ``tests/tiny.py``: the tests of this package run on every entry
there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from rap_env.errors import ChecksumError, ModelNotAvailableError, UnsupportedModelError
from rap_env.levels import CacheLevel
from rap_env.models.families.placeholders import RemovedAttention, RemovedBlock, RemovedFFN


@dataclass(frozen=True)
class Family:
    """Location of the blocks in models of one family. Paths are attribute names joined by dots.

    Attributes:
        decoder: Path from the causal language model to the module that returns the last
            hidden state.
        attn: Name of a layer's attention module.
        attn_norms: Norms that only the attention block uses.
        ffn_norms: Norms that only the feed-forward block uses.
        ffn: Names of a layer's feed-forward modules, in the order of their calls; the last
            one returns the block's output.
        layers: Path from the decoder to the list of layers.
        ffn_width: Widest hidden activation for one token, from the config.
        check: Raises `UnsupportedModelError` for a config of the family that cannot be
            masked.
        parallel: Whether both blocks of a layer read the same state, from the config.
    """

    decoder: str
    attn: str
    attn_norms: tuple[str, ...]
    ffn_norms: tuple[str, ...]
    ffn: tuple[str, ...] = ("mlp",)
    layers: str = "layers"
    ffn_width: Callable[[Any], int] = lambda config: int(config.intermediate_size)
    check: Callable[[Any], None] = lambda config: None  # accepts every layout
    parallel: Callable[[Any], bool] = lambda config: False


def _gpt2_width(config: Any) -> int:
    return int(config.n_inner if config.n_inner is not None else 4 * config.hidden_size)


def _qwen2_moe_width(config: Any) -> int:
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    experts = routed + config.shared_expert_intermediate_size
    layers = range(config.num_hidden_layers)
    sparse = [
        layer not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
        for layer in layers
    ]
    return int(max(experts if any(sparse) else 0, 0 if all(sparse) else config.intermediate_size))


def _check_gpt2(config: Any) -> None:
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            "This GPT-2 model has cross-attention (add_cross_attention=True), which is "
            "neither an attn nor an ffn block of a decoder; use one without it."
        )


def _check_opt(config: Any) -> None:
    if not config.do_layer_norm_before:
        raise UnsupportedModelError(
            "This OPT model normalises after each block (do_layer_norm_before=False, as in "
            "opt-350m), so that a removed block would leave a norm in the residual stream. Use an "
            "OPT model of another size."
        )


def _check_causal(config: Any) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            "This Gemma model attends in both directions (use_bidirectional_attention), so it "
            "is an encoder and writes no KV cache; use a causal one."
        )


_PRE_NORM = Family(
    decoder="model",
    attn="self_attn",
    attn_norms=("input_layernorm",),
    ffn_norms=("post_attention_layernorm",),
)
_GEMMA = Family(
    decoder="model",
    attn="self_attn",
    attn_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    check=_check_causal,
)

FAMILIES: dict[str, Family] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "mixtral": replace(
        _PRE_NORM, ffn_width=lambda config: config.num_experts_per_tok * config.intermediate_size
    ),
    "qwen2_moe": replace(_PRE_NORM, ffn_width=_qwen2_moe_width),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": replace(_GEMMA, decoder="model.language_model"),
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        attn="attn",
        attn_norms=("ln_1",),
        ffn_norms=("ln_2",),
        ffn_width=_gpt2_width,
        check=_check_gpt2,
    ),
    "opt": Family(
        decoder="model.decoder",
        attn="self_attn",
        attn_norms=("self_attn_layer_norm",),
        # OPT has no module for its feed-forward block: its parts are attributes of the layer.
        ffn=("fc1", "activation_fn", "fc2"),
        ffn_norms=("final_layer_norm",),
        ffn_width=lambda config: int(config.ffn_dim),
        check=_check_opt,
    ),
    # Each block has its own norm, also with the parallel residual.
    "gpt_neox": Family(
        decoder="gpt_neox",
        attn="attention",
        attn_norms=("input_layernorm",),
        ffn_norms=("post_attention_layernorm",),
        parallel=lambda config: bool(config.use_parallel_residual),
    ),
}


@dataclass
class Slot:
    """One attribute of a module that holds a part of a block; it may have a placeholder.

    A module at another level of weights may stand in for the original (`put`).

    Modules are replaced in the parent's own table of modules. ``setattr`` does the same after
    looking for a parameter, a buffer or a plain attribute of that name; there is none, since
    `original` was found in the table. The direct way is faster, and a mask may change between
    any two tokens.
    """

    parent: nn.Module
    attribute: str
    original: nn.Module
    placeholder: nn.Module | None = None
    _present: nn.Module | None = None

    def remove(self) -> None:
        """Replace the part by the placeholder."""
        self.parent._modules[self.attribute] = self.placeholder

    def restore(self) -> None:
        """Put the part back."""
        self.parent._modules[self.attribute] = (
            self.original if self._present is None else self._present
        )

    def put(self, module: nn.Module) -> None:
        """Let a module stand in for the original, at once or once the block is restored."""
        self._present = module
        if self.parent._modules[self.attribute] is not self.placeholder:
            self.parent._modules[self.attribute] = module


@dataclass(frozen=True)
class BlockSite:
    """All slots of one block: its modules, and the norms that only it uses.

    Attributes:
        slots: The slots; the first one holds the attention or the last feed-forward module.
    """

    index: int
    slots: tuple[Slot, ...]

    @property
    def pruned(self) -> bool:
        """Whether the model was built without the block, so that it cannot be restored."""
        return isinstance(self.slots[0].original, RemovedBlock)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The block's own modules."""
        return tuple(slot.original for slot in self.slots)

    def remove(self) -> None:
        """Take the block out of its layer."""
        for slot in self.slots:
            slot.remove()

    def restore(self) -> None:
        """Put the block back into its layer."""
        for slot in self.slots:
            slot.restore()

    def set_cache_level(self, level: CacheLevel) -> None:
        """Let an attention block store its KV cache at a level, from its next call on.

        The level is the attribute ``cache_level`` of the attention module; native ones have
        none.
        """
        attention = self.slots[0].original
        if not level.native:
            attention.__dict__["cache_level"] = level
        else:
            attention.__dict__.pop("cache_level", None)


@dataclass(frozen=True)
class FamilyAdapter:
    """Describes the blocks of one model from its config; needs no weights.

    Attributes:
        config: The config of the decoder (of the text part, if there are several).
        num_layers: L, the number of decoder layers.
        parallel: Whether both blocks of a layer read the same state (parallel residual).
        hidden_size: Width of the residual stream.
        ffn_width: Widest hidden activation of a feed-forward block for one token, experts
            included.
        vocab_size: Entries of the head.
        max_positions: Longest sequence that the model supports, in tokens.
        kv_heads: Key and value heads of a layer.
        kv_head_size: Channels of a key or value head.
    """

    model_type: str
    config: Any
    family: Family
    num_layers: int
    parallel: bool
    hidden_size: int
    ffn_width: int
    vocab_size: int
    max_positions: int
    kv_heads: int
    kv_head_size: int

    @property
    def num_blocks(self) -> int:
        """2L, an attn and an ffn block a layer."""
        return 2 * self.num_layers

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values of one token in one layer, with `itemsize` bytes a value."""
        return 2 * self.kv_heads * self.kv_head_size * itemsize

    @cached_property
    def kv_window_tokens(self) -> tuple[int | None, ...]:
        """Most tokens that each layer's cache holds between steps, None without limit, (L,).

        A layer with a sliding window of w tokens holds w - 1: the token at hand is the w-th.
        """
        from transformers import DynamicCache

        # The cache knows which layers have a sliding window: families encode it in different
        # ways.
        layers: list[Any] = DynamicCache(config=self.config).layers
        return tuple(
            layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
            for layer in layers
        )

    def cap_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply Gemma's soft cap, the only change that a family's `forward` makes to logits."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module that turns token ids into the last hidden state."""
        try:
            return model.get_submodule(self.family.decoder)
        except AttributeError:
            raise UnsupportedModelError(
                f"A {self.model_type} model has its decoder at {self.family.decoder!r}, but "
                f"{type(model).__name__} has none there; load it with AutoModelForCausalLM."
            ) from None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in order."""
        return cast("nn.ModuleList", self.decoder(model).get_submodule(self.family.layers))

    def sites(self, model: nn.Module) -> tuple[BlockSite, ...]:
        """The sites of the blocks of a live model, in order of index, (2L,)."""
        self.decoder(model)  # its error is clearer than that of a missing module
        return tuple(self._site(model, index) for index in range(self.num_blocks))

    def _site(self, model: nn.Module, index: int) -> BlockSite:
        layer, is_ffn = divmod(index, 2)
        placeholder: nn.Module = RemovedFFN() if is_ffn else RemovedAttention(layer)
        slots = []
        for path in self.module_paths(index):
            parent, _, attribute = path.rpartition(".")
            module = model.get_submodule(path)
            slots.append(Slot(model.get_submodule(parent), attribute, module, placeholder))
            # Of the modules beside the one that returns the output.
            placeholder = nn.Identity()
        return BlockSite(index, tuple(slots))

    def module_paths(self, index: int) -> tuple[str, ...]:
        """Paths in the model of a block's modules, the one that returns its output first."""
        family, (layer, is_ffn) = self.family, divmod(index, 2)
        *inner, last = family.ffn if is_ffn else (family.attn,)
        norms = family.ffn_norms if is_ffn else family.attn_norms
        place = f"{family.decoder}.{family.layers}.{layer}"
        return tuple(f"{place}.{name}" for name in (last, *inner, *norms))


def adapter_for(config: Any) -> FamilyAdapter:
    """The adapter for a model's config; nothing of the model itself is loaded."""
    model_type = str(config.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"The blocks of model type {model_type!r} are not known; known are "
            f"{', '.join(sorted(FAMILIES))}. To add one, describe where its blocks are in FAMILIES "
            "of rap_env/models/families/families.py (its docstring explains how)."
        )
    decoder = config.get_text_config(decoder=True)
    family.check(decoder)
    heads, size = decoder.num_attention_heads, getattr(decoder, "head_dim", None)
    return FamilyAdapter(
        model_type,
        decoder,
        family,
        num_layers=int(decoder.num_hidden_layers),
        parallel=family.parallel(decoder),
        hidden_size=int(decoder.hidden_size),
        ffn_width=family.ffn_width(decoder),
        vocab_size=int(decoder.vocab_size),
        max_positions=int(decoder.max_position_embeddings),
        kv_heads=int(getattr(decoder, "num_key_value_heads", None) or heads),
        kv_head_size=int(size or decoder.hidden_size // heads),
    )


def read_config(folder: Path) -> Any:
    """The config of a model folder whose family is known; reads no weights."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotAvailableError(
            f"{folder} has no config.json; give a folder that model.save_pretrained() wrote, or a "
            "GGUF file."
        )
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ChecksumError(f"{path} is truncated or damaged; download the model again.") from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its type depends on the entry that is wrong
        check_family(model_type)
        raise UnsupportedModelError(f"transformers cannot read {path}: {error}") from error
    adapter_for(config)
    return config


def check_family(model_type: object) -> None:
    """Reject a family by its name alone, where transformers cannot create a config for it."""
    if str(model_type) not in FAMILIES:
        adapter_for(SimpleNamespace(model_type=model_type))
