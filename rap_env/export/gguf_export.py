"""Write a model under a plan as a GGUF file for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf import GGUFWriter

from rap_env.artifacts import atomic_write
from rap_env.errors import UnsupportedModelError
from rap_env.export.deci import ARCHITECTURE, ZERO_FFN_LENGTH, DeciLayer, deci_layers, deci_shape
from rap_env.export.gguf_model import ATTN_PARTS, FFN_PARTS, GgufModel
from rap_env.export.gguf_tensors import GgufTensor
from rap_env.export.llama_cpp import cache_type
from rap_env.levels import WeightLevel
from rap_env.models.weights.packed_layout import LOW_BIT_FORMATS
from rap_env.plan import Plan

Means = Mapping[int, npt.NDArray[np.float32]]
"""What is added to the residual stream in the place of removed blocks, (H,), by index."""


def export_gguf(
    model: GgufModel, plan: Plan, path: Path, means: Means | None = None
) -> dict[WeightLevel, list[GgufTensor]]:
    """Write a GGUF file of the architecture ``deci``.

    The file appears only when it is complete; an older one is replaced. Quantised tensors of a GGUF
    source are copied unless the plan lowers them. Levels of caches are settings of the engine and
    not in the file; see `rap_env.export.llama_cpp`.

    Args:
        model: The model; with `low_bits` if the plan has such levels.
        plan: The plan.
        path: The file to write.
        means: Means of stubs of rank 0; they become biases of the blocks before.

    Returns:
        The tensors of the file, by the level of the plan that their item has.

    Raises:
        UnknownNameError: The model does not have an item of the plan.
        UnsupportedModelError: llama.cpp has no such level or layout.
        StorageFullError: The disk is full; an older file is intact.
    """
    plan.check(2 * model.num_layers)
    cache_type(plan, model.num_layers)
    if not (model.low_bits or plan.weight_levels.isdisjoint(LOW_BIT_FORMATS)):
        raise UnsupportedModelError(
            f"A GGUF file of {model.name} has no weights for the plan ({plan}): the live model "
            "makes them; give what low_bit_tensors(llm, plan) returns."
        )
    means = means or {}
    layers = deci_layers(model.num_layers, plan, means)
    tensors = dict(_all_tensors(model, plan, layers, means))
    with atomic_write(path) as file:
        writer = GGUFWriter(file.name, ARCHITECTURE)
        for key, (value, kind, inner) in (*model.entries.items(), *_by_plan(model, layers)):
            writer.add_key_value(key, value, kind, sub_type=inner)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    levels = {
        f"blk.{number}.{part}": plan.weight_level(index)
        for number, layer in enumerate(layers)
        for index in layer.blocks
        for part in (FFN_PARTS if index % 2 else ATTN_PARTS)
    }
    written: dict[WeightLevel, list[GgufTensor]] = {}
    for name, tensor in tensors.items():
        outside = "native" if name.startswith("blk.") else plan.embeddings
        level = levels.get(name.rpartition(".")[0], outside)
        written.setdefault(level, []).append(tensor)
    return written


def _by_plan(model: GgufModel, layers: Sequence[DeciLayer]) -> Iterator[tuple[str, Any]]:
    """The header's entries that depend on the plan."""
    yield f"{ARCHITECTURE}.block_count", (len(layers), Value.UINT32, None)
    shape = deci_shape(layers, model.heads, model.kv_heads, model.ffn_length)
    for name, numbers in shape.items():
        yield f"{ARCHITECTURE}.{name}", (numbers, Value.ARRAY, Value.INT32)


def _all_tensors(
    model: GgufModel, plan: Plan, layers: Sequence[DeciLayer], means: Means
) -> Iterator[tuple[str, GgufTensor]]:
    for name in model.tensors:
        if not name.startswith("blk."):
            lowered = (
                plan.embeddings if name in ("token_embd.weight", "output.weight") else "native"
            )
            yield name, model.tensor_at(name, lowered)
    for number, layer in enumerate(layers):
        place = f"blk.{number}"
        if layer.attn is not None:
            yield from _block(model, plan, 2 * layer.attn, place)
            yield from _bias(model, f"{place}.attn_output", layer.attn, layer.attn_bias, means)
        elif number == 0:
            yield from _no_attention(model.hidden_size, place)
        if layer.ffn is not None:
            yield from _block(model, plan, 2 * layer.ffn + 1, place)
            yield from _bias(model, f"{place}.ffn_down", layer.ffn, layer.ffn_bias, means)
        else:
            yield from _no_ffn(model.hidden_size, place)


def _block(
    model: GgufModel, plan: Plan, index: int, place: str
) -> Iterator[tuple[str, GgufTensor]]:
    """The tensors of a kept block but for the bias of its output."""
    level = plan.weight_level(index)
    for part in FFN_PARTS if index % 2 else ATTN_PARTS:
        for kind in ("weight", "bias"):
            name = f"blk.{index // 2}.{part}.{kind}"
            output = kind == "bias" and part in ("attn_output", "ffn_down")
            if name in model.tensors and not output:
                yield f"{place}.{part}.{kind}", model.tensor_at(name, level)


def _bias(
    model: GgufModel, name: str, layer: int, added: Sequence[int], means: Means
) -> Iterator[tuple[str, GgufTensor]]:
    """The bias of a block's output, with the means that are added there."""
    own = model.tensors.get(f"blk.{layer}.{name.rpartition('.')[2]}.bias")
    parts = [] if own is None else [own.values()]
    parts += [np.asarray(means[index], np.float32) for index in added]
    if parts:
        total = np.asarray(np.sum(parts, axis=0, dtype=np.float32))
        yield f"{name}.bias", GgufTensor(total, Kind.F32)


def _no_attention(width: int, place: str) -> Iterator[tuple[str, GgufTensor]]:
    """Linear attention that adds nothing."""
    yield f"{place}.attn_norm.weight", GgufTensor(np.ones(width, np.float32), Kind.F32)
    yield f"{place}.attn_output.weight", GgufTensor.small_zeros(width, width)


def _no_ffn(width: int, place: str) -> Iterator[tuple[str, GgufTensor]]:
    """An FFN block that adds nothing."""
    yield f"{place}.ffn_norm.weight", GgufTensor(np.ones(width, np.float32), Kind.F32)
    for part in ("ffn_gate", "ffn_up"):
        yield f"{place}.{part}.weight", GgufTensor.zeros(ZERO_FFN_LENGTH, width)
    yield f"{place}.ffn_down.weight", GgufTensor.zeros(width, ZERO_FFN_LENGTH)
