"""The supported decoder families: the names of their modules.

To add a family, add a `Family` to `FAMILIES` under its ``config.model_type``. Two conditions
must hold: each decoder layer adds its attention and feed-forward outputs to the residual
stream *outside* these modules, so that an output of zeros has no effect; and there is no
biased norm between a block's output and that sum. A norm that both blocks use (one norm in
front of a parallel layer) belongs to neither: list only norms that a single block uses. Then
add a two-layer model to ``tests/tiny.py``: the tests of this package run on every entry
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rap_env.errors import UnsupportedModelError


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
