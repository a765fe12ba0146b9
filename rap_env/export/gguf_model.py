"""Llama-like models as GGUF files state them, with levels that only a live model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType as Value

from rap_env.errors import UnsupportedModelError
from rap_env.export.deci import ARCHITECTURE
from rap_env.export.gguf_tensors import GgufTensor
from rap_env.levels import WeightLevel
from rap_env.models.files.gguf_reader import GgufFile
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.packed_layout import LOW_BIT_FORMATS
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.plan import Plan

_SOURCE = "llama"  # the architecture of GGUF files that can be exported
_BY_LAYER = (
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
)

Entry = tuple[Any, Value, Value | None]
"""Value, type, and the type of an array's elements."""

ATTN_PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
FFN_PARTS = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
"""Tensors of a block in the files."""

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
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
            raise UnsupportedModelError(
                f"llama.cpp can only leave blocks out of models like Llama (its architecture "
                f"{ARCHITECTURE}), and {path.name} ({architecture}) is none; known are {_SOURCE}. "
                "Export it for transformers (--to hf)."
            )
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


def _gguf_name(name: str) -> str:
    """The name in a file of a live model's matrix."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(middle)]}.{kind}"


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order.

    The two halves of a head are rotated together; there they alternate.
    """
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
