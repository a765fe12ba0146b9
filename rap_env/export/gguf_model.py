"""Llama-like models as GGUF files state them: from such a file, or from a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType as Value

from rap_env.errors import UnsupportedModelError
from rap_env.export.deci import ARCHITECTURE
from rap_env.export.gguf_tensors import GgufTensor
from rap_env.export.gguf_tokenizer import Entry, tokenizer_entries
from rap_env.levels import WeightLevel
from rap_env.models.files.gguf_reader import GgufFile
from rap_env.models.files.pruned_code import LLAMA_LIKE
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.packed_layout import LOW_BIT_FORMATS
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.plan import Plan

_SOURCE = "llama"  # the architecture of GGUF files that can be exported
_ROTARY = ("default", "linear", "llama3")
_BY_LAYER = (
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
)

ATTN_PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
FFN_PARTS = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
"""Tensors of a block in the files."""

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model to export.

    Attributes:
        name: Its name.
        num_layers: L.
        heads: Attention heads of a layer.
        kv_heads: Key and value heads of a layer.
        hidden_size: Width of the residual stream.
        ffn_length: Width of an FFN block.
        entries: All entries of the new header but those that depend on the plan.
        tensors: Tensors by their names in a file (``blk.7.attn_q.weight``), in order.
        low_bits: Those of a plan at levels that files do not have; see `low_bit_tensors`.
    """

    name: str
    num_layers: int
    heads: int
    kv_heads: int
    hidden_size: int
    ffn_length: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, GgufTensor]
    low_bits: Mapping[str, GgufTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {name.split(".")[2] for name in self.tensors if name.startswith("blk.")}
        if unknown := sorted(parts - {*ATTN_PARTS, *FFN_PARTS}):
            raise UnsupportedModelError(
                f"The blocks of {self.name} have tensors that llama.cpp's architecture "
                f"{ARCHITECTURE} does not compute: {', '.join(unknown)}; export it for "
                "transformers (--to hf)."
            )

    def tensor_at(self, name: str, level: WeightLevel) -> GgufTensor:
        """A tensor at a level; see `GgufTensor.at`."""
        if level in LOW_BIT_FORMATS and name in self.low_bits:
            return self.low_bits[name]
        return self.tensors[name].at(level, name)

    @classmethod
    def of_file(cls, path: Path) -> GgufModel:
        """The model of a GGUF file; its tensors stay mapped.

        Raises:
            ChecksumError: It is damaged.
            UnsupportedModelError: Its blocks are not those of Llama.
        """
        file = GgufFile(path)
        architecture = file.value("general.architecture")
        if architecture != _SOURCE:
            raise _unsupported(f"{path.name} ({architecture})", (_SOURCE,))
        sizes = [
            file.value(f"{_SOURCE}.{name}")
            for name in ("block_count", "attention.head_count", "embedding_length")
        ]
        layers, heads, width = (int(size) for size in sizes)
        kv_heads = int(file.value(f"{_SOURCE}.attention.head_count_kv", heads))
        entries: dict[str, Entry] = {}
        for name, stated in file.fields.items():
            own = name.removeprefix(f"{_SOURCE}.")
            key = name if own == name else f"{ARCHITECTURE}.{own}"
            if name != "general.architecture" and own not in _BY_LAYER:
                inner = stated.types[-1] if stated.types[0] == Value.ARRAY else None
                entries[key] = (stated.contents(), stated.types[0], inner)
        for kind in ("key", "value"):  # else llama.cpp divides by the heads of the first layer
            length = (width // heads, Value.UINT32, None)
            entries.setdefault(f"{ARCHITECTURE}.attention.{kind}_length", length)
        return cls(
            name=path.stem,
            num_layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            hidden_size=width,
            ffn_length=int(file.value(f"{_SOURCE}.feed_forward_length")),
            entries=entries,
            tensors={t.name: GgufTensor(t.data, t.tensor_type) for t in file.tensors},
        )

    @classmethod
    def of_llm(cls, llm: ElasticLLM) -> GgufModel:
        """A live model with unquantised weights.

        Raises:
            UnsupportedModelError: Its blocks are not those of Llama, its positions or its tokenizer
                cannot be stated, or its weights are packed.
        """
        config = llm.adapter.config
        _check(llm)
        heads, size = int(config.num_attention_heads), llm.adapter.kv_head_size
        numbers = {
            "context_length": llm.adapter.max_positions,
            "embedding_length": llm.adapter.hidden_size,
            "vocab_size": llm.adapter.vocab_size,
            "rope.dimension_count": size,
            "attention.key_length": size,
            "attention.value_length": size,
        }
        entries: dict[str, Entry] = {
            "general.type": ("model", Value.STRING, None),
            "general.name": (llm.name, Value.STRING, None),
            "general.quantization_version": (2, Value.UINT32, None),
        }
        entries |= {f"{ARCHITECTURE}.{k}": (v, Value.UINT32, None) for k, v in numbers.items()}
        epsilon, base = float(config.rms_norm_eps), float(config.rope_parameters["rope_theta"])
        key = f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"
        entries[key] = (epsilon, Value.FLOAT32, None)
        entries[f"{ARCHITECTURE}.rope.freq_base"] = (base, Value.FLOAT32, None)
        with llm.masked(Plan()):
            tensors = dict(_tensors(llm, heads, llm.adapter.kv_heads))
            factors = _rotary_factors(llm.model, base, size)
        if factors is not None:
            tensors["rope_freqs.weight"] = GgufTensor.of(factors)
        return cls(
            name=llm.name,
            num_layers=llm.adapter.num_layers,
            heads=heads,
            kv_heads=llm.adapter.kv_heads,
            hidden_size=llm.adapter.hidden_size,
            ffn_length=llm.adapter.ffn_width,
            entries=entries | tokenizer_entries(llm.tokenizer, llm.adapter.vocab_size),
            tensors=tensors,
        )


def low_bit_tensors(llm: ElasticLLM, plan: Plan) -> dict[str, GgufTensor]:
    """The matrices of a live model at a plan's levels that GGUF files do not have, by their names.

    Args:
        llm: A model whose blocks are those of Llama; it makes these levels if they do not exist.
        plan: The plan.
    """
    low = {name: level for name, level in plan.levels.items() if level in LOW_BIT_FORMATS}
    heads = {"attn_q": int(llm.adapter.config.num_attention_heads), "attn_k": llm.adapter.kv_heads}
    tensors = {}
    with llm.masked(Plan()):
        native = set(llm.model.modules())
    with llm.masked(Plan.of(low)):
        for module_name, module in llm.model.named_modules():
            if not isinstance(module, PackedModule) or module in native:
                continue
            tensor = GgufTensor.of_matrix(module.matrices["weight"])
            name = _gguf_name(f"{module_name}.weight")
            if part_heads := heads.get(name.split(".")[-2]):
                rows = _interleaved(torch.from_numpy(tensor.data), part_heads)
                tensor = GgufTensor(rows.contiguous().numpy(), tensor.kind)
            tensors[name] = tensor
    return tensors


def _unsupported(what: str, known: tuple[str, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp can only leave blocks out of models like Llama (its architecture "
        f"{ARCHITECTURE}), and {what} is none; known are {', '.join(known)}. Export it for "
        "transformers (--to hf)."
    )


def _check(llm: ElasticLLM) -> None:
    config, kind = llm.adapter.config, llm.adapter.model_type
    if kind not in LLAMA_LIKE:
        raise _unsupported(f"{llm.name} ({kind})", LLAMA_LIKE)
    if llm.facts.packed:
        raise UnsupportedModelError(
            f"The weights of {llm.name} are packed; load the model with weights='bf16', or export "
            "from its GGUF file."
        )
    windows = [window for window in llm.adapter.kv_window_tokens if window is not None]
    if windows and min(windows) + 1 < llm.adapter.max_positions:
        raise UnsupportedModelError(
            f"{llm.name} has a sliding window of {min(windows) + 1} tokens, and llama.cpp's "
            f"architecture {ARCHITECTURE} has none; export it for transformers (--to hf)."
        )
    rotary = config.rope_parameters["rope_type"]
    if config.hidden_act != "silu" or rotary not in _ROTARY:
        raise UnsupportedModelError(
            f"llama.cpp's architecture {ARCHITECTURE} computes silu and rotary positions of the "
            f"kinds {', '.join(_ROTARY)}, but {llm.name} has {config.hidden_act} and {rotary}."
        )


def _tensors(llm: ElasticLLM, heads: int, kv_heads: int) -> Iterator[tuple[str, GgufTensor]]:
    tied = llm.model.config.tie_word_embeddings
    for name, tensor in llm.model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        gguf_name = _gguf_name(name)
        part = gguf_name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            tensor = _interleaved(tensor, heads if part == "attn_q" else kv_heads)
        yield gguf_name, GgufTensor.of(tensor)


def _gguf_name(name: str) -> str:
    """The name in a file of a live model's tensor."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_NAMES.get('.'.join(middle), '.'.join(middle))}.{kind}"


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (or values) of queries or keys in llama.cpp's order.

    The two halves of a head are rotated together; there they alternate.
    """
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _rotary_factors(model: Any, base: float, head_size: int) -> torch.Tensor | None:
    """By what the plain frequency of each pair of channels is divided, (D / 2,); None if all 1."""
    rotary = model.model.rotary_emb
    plain = 1.0 / base ** (np.arange(0, head_size, 2) / head_size)
    factors = torch.from_numpy(plain).float() / rotary.inv_freq.float().cpu()
    return None if torch.allclose(factors, torch.ones(1), rtol=1e-5) else factors
