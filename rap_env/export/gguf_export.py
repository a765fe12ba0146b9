"""Write a model under a plan as a GGUF file for llama.cpp.

============  ==============================================================================
Level         Type in the file
============  ==============================================================================
native        its own
int8          Q8_0; the groups of a row have the row's scale
int4          Q4_1, in groups of 32
int4-compact  Q4_1 with the live level's values, which takes half a bit more
int3          the same, 1.6 bits more
int2          Q4_1, rounded again because its groups of 32 are longer, 2.2 bits more
============  ==============================================================================

A tensor that is stored in as few bits already is kept, as live levels do. The codes are those
of the live level; its scales and minima are rounded to float16, which loses less than their
bfloat16. llama.cpp's own types of 3 and 2 bits need rows of a multiple of 256 values. Levels
that files do not have are made by a live model (`low_bit_tensors`).

The layouts of the blocks are those of llama.cpp's ``ggml-common.h``.

In llama.cpp's architecture ``deci`` each layer has its own number of heads and its own FFN
length, so that a layer may have only an attention or only an FFN block. Some layouts that its
header can state are computed wrong or rejected by llama.cpp, and must not be written:

- with an FFN length of 0 the whole layer is skipped, its attention block included;
- with an FFN length of 0 in the last layer the program aborts;
- without heads in layer 0 the file cannot be loaded, since the size of a head is read there.

So kept blocks are packed into new layers. The residual stream passes through all blocks in
order, and thus an attention block and the next FFN block may be of different layers if no
other kept block lies between. An attention block that is followed by another one gets an FFN
block of zeros. If the first layer has no attention block, it gets "linear attention" with a
matrix of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf.quants import dequantize

from rap_env.artifacts import atomic_write
from rap_env.errors import UnsupportedModelError
from rap_env.levels import WeightLevel
from rap_env.models.files.gguf_conversion import GgufFile
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS, LowBitMatrix
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.models.weights.packing import GROUP_INPUTS, MIDDLE, PackedMatrix, by_input
from rap_env.models.weights.quantisers import quantise
from rap_env.plan import Plan
from rap_env.request import Request

ARCHITECTURE = "deci"

ZERO_FFN_LENGTH = 32
"""Length of an FFN block of zeros."""


@dataclass
class DeciLayer:
    """One layer of the exported model: which blocks of the base model it consists of.

    Attributes:
        attn: The layer of the base model whose attention block it has, or None.
        ffn: The layer whose FFN block it has, or None.
    """

    attn: int | None = None
    ffn: int | None = None


def deci_layers(num_layers: int, removed: Plan) -> list[DeciLayer]:
    """Pack the kept blocks of a model into layers.

    Args:
        num_layers: Layers of the base model.
        removed: The removed blocks.

    Raises:
        UnsupportedModelError: No attention block is kept.
    """
    layers: list[DeciLayer] = []
    for index in range(2 * num_layers):
        if index in removed.removed:
            continue
        if index % 2 == 0:
            layers.append(DeciLayer(attn=index // 2))
            continue
        if not layers or layers[-1].ffn is not None:
            layers.append(DeciLayer())
        layers[-1].ffn = index // 2
    if all(layer.attn is None for layer in layers):
        raise UnsupportedModelError(
            "llama.cpp cannot run a model without any attention block, and this plan removes all "
            "of them; keep one."
        )
    return layers


def deci_shape(
    layers: Sequence[DeciLayer], heads: int, kv_heads: int, ffn_length: int
) -> dict[str, list[int]]:
    """The numbers that ``deci`` states for each layer, by name.

    The layers of the base model all have these sizes. Heads without key and value heads mean
    linear attention.
    """
    attn = [layer.attn is not None for layer in layers]
    return {
        "attention.head_count": [heads, *(heads * has for has in attn[1:])],
        "attention.head_count_kv": [kv_heads * has for has in attn],
        "feed_forward_length": [
            ZERO_FFN_LENGTH if layer.ffn is None else ffn_length for layer in layers
        ],
    }


_TYPE_OF_LEVEL = {"native": "f16", "int8": "q8_0", "int4": "q4_1"}
"""llama.cpp's formats of a cache by level; it has one for all keys and one for all values."""


def cache_type(plan: Plan, num_layers: int) -> str:
    """llama.cpp's format of the caches of a plan, for ``-ctk`` and ``-ctv``.

    Args:
        plan: The plan.
        num_layers: Layers of the model.

    Raises:
        UnsupportedModelError: Its kept caches have several levels, or one without a
            counterpart.
    """
    kept = (n for n in range(num_layers) if 2 * n not in plan.removed)
    levels = {plan.cache_level(layer).name for layer in kept} or {"native"}
    if len(levels) > 1 or levels - _TYPE_OF_LEVEL.keys():
        raise UnsupportedModelError(
            "llama.cpp stores the caches of all layers in one format, those of the levels "
            f"{', '.join(_TYPE_OF_LEVEL)}, but the plan has {', '.join(sorted(levels))}; choose "
            "another plan."
        )
    return _TYPE_OF_LEVEL[levels.pop()]


def server_flags(cache: str, request: Request | None) -> str:
    """Options of ``llama-server`` for a format of caches, and for a request if there is one.

    Quantised caches need flash attention.
    """
    flags = f"-ctk {cache} -ctv {cache}{'' if cache == 'f16' else ' -fa on'}"
    if request is None:
        return flags
    rows = request.batch_size
    return f"{flags} -c {rows * request.seq_len_tokens} -np {rows}"


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor as a file stores it.

    Attributes:
        data: Values (out, in) or (out,); rows of bytes for BF16 and quantised types.
        kind: Its type.
    """

    data: npt.NDArray[Any]
    kind: Kind

    @classmethod
    def of_matrix(cls, matrix: PackedMatrix) -> GgufTensor:
        """A packed matrix of 4 bits or less in Q4_1."""
        if matrix.level == "int2":
            matrix = quantise(matrix.widened(torch.float32), "int4")
        if matrix.level not in LOW_BIT_FORMATS:
            codes = matrix.code_rows(torch.arange(matrix.shape[0]))
            return cls(_q4_1(codes, *matrix.scales.float().unbind(-1)), Kind.Q4_1)
        assert isinstance(matrix, LowBitMatrix)
        pairs = LOW_BIT_FORMATS[matrix.level].kernel_scales(matrix.scales, matrix.zeros)
        scale, zero = (pairs.float() * matrix.factors.float()[:, None]).unbind(-1)
        centred = matrix.widened(torch.float32) - by_input(zero, matrix.shape[1])
        codes = (centred / by_input(scale, matrix.shape[1])).round() + MIDDLE
        return cls(_q4_1(codes, scale, zero), Kind.Q4_1)

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return self.data.nbytes

    def at(self, level: WeightLevel, name: str) -> GgufTensor:
        """The tensor at a level; itself where it takes no more bits, and if it is a vector.

        At a level of `LOW_BIT_FORMATS` it is at int4: a matrix that has that level is
        `of_matrix`.

        Raises:
            UnsupportedModelError: Its rows cannot be cut into groups of 32; `name` is in the
                text.
        """
        kind = Kind.Q8_0 if level == "int8" else Kind.Q4_1
        if level == "native" or self.data.ndim == 1 or _bits(self.kind) <= _bits(kind):
            return self
        weight = torch.from_numpy(np.array(dequantize(self.data, self.kind), dtype=np.float32))
        if weight.shape[1] % GROUP_INPUTS:
            raise UnsupportedModelError(
                f"{name} has rows of {weight.shape[1]} values, which is no multiple of "
                f"{GROUP_INPUTS}, so it has no level {level} in a GGUF file; leave it native."
            )
        if kind == Kind.Q8_0:
            return GgufTensor(_q8_0(quantise(weight, "int8")), kind)
        return GgufTensor.of_matrix(quantise(weight, "int4"))

    @classmethod
    def zeros(cls, *shape: int) -> GgufTensor:
        """Zeros in float32."""
        return cls(np.zeros(shape, np.float32), Kind.F32)

    @classmethod
    def small_zeros(cls, rows: int, inputs: int) -> GgufTensor:
        """A matrix of zeros in as few bytes as its rows allow."""
        if inputs % GROUP_INPUTS:
            return cls.zeros(rows, inputs)
        blocks = gguf.quantize(np.zeros((rows, inputs), np.float32), Kind.Q4_0)
        return cls(blocks, Kind.Q4_0)


def _bits(kind: Kind) -> float:
    """Bits that a value takes, scales included."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return float(8 * size / values)


def _q8_0(matrix: PackedMatrix) -> npt.NDArray[np.uint8]:
    """Blocks of a scale and 32 codes, (out, bytes)."""
    rows = matrix.shape[0]
    codes = matrix.codes.numpy().reshape(rows, -1, GROUP_INPUTS)
    scales = matrix.scales.float().numpy().astype(np.float16)
    scales = np.broadcast_to(scales[:, None, None], (*codes.shape[:2], 1))
    parts = [np.ascontiguousarray(part).view(np.uint8) for part in (scales, codes)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _q4_1(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Blocks of a scale, a minimum and 32 codes, two a byte, (out, bytes).

    Args:
        codes: 0 to 15, (out, in).
        scale: (groups, out).
        zero: The weight of code 8, (groups, out).
    """
    rows = len(codes)
    blocks = codes.to(torch.uint8).numpy().reshape(rows, -1, GROUP_INPUTS)
    low, high = np.split(blocks, 2, axis=-1)
    numbers = torch.stack((scale.T, (zero - MIDDLE * scale).T), dim=-1).numpy().astype(np.float16)
    parts = [np.ascontiguousarray(numbers).view(np.uint8), low | (high << 4)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


_SOURCE = "llama"  # the architecture of GGUF files that can be exported
_BY_PLAN = (
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
)
_ATTN_PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_FFN_PARTS = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")

Entry = tuple[Any, Value, Value | None]
"""Value, type, and the type of an array's elements."""


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
        parts = {t.name.split(".")[2] for t in file.tensors if t.name.startswith("blk.")}
        if unknown := sorted(parts - {*_ATTN_PARTS, *_FFN_PARTS}):
            raise UnsupportedModelError(
                f"The blocks of {path.stem} have tensors that llama.cpp's architecture "
                f"{ARCHITECTURE} does not compute: {', '.join(unknown)}; export it for "
                "transformers (--to hf)."
            )
        heads = int(file.value(f"{_SOURCE}.attention.head_count"))
        width = int(file.value(f"{_SOURCE}.embedding_length"))
        entries: dict[str, Entry] = {}
        for name, stated in file.fields.items():
            own = name.removeprefix(f"{_SOURCE}.")
            key = name if own == name else f"{ARCHITECTURE}.{own}"
            if name != "general.architecture" and own not in _BY_PLAN:
                inner = stated.types[-1] if stated.types[0] == Value.ARRAY else None
                entries[key] = (stated.contents(), stated.types[0], inner)
        # Else llama.cpp divides by the heads of the first layer.
        for kind in ("key", "value"):
            length = (width // heads, Value.UINT32, None)
            entries.setdefault(f"{ARCHITECTURE}.attention.{kind}_length", length)
        return cls(
            name=path.stem,
            num_layers=int(file.value(f"{_SOURCE}.block_count")),
            heads=heads,
            kv_heads=int(file.value(f"{_SOURCE}.attention.head_count_kv", heads)),
            hidden_size=width,
            ffn_length=int(file.value(f"{_SOURCE}.feed_forward_length")),
            entries=entries,
            tensors={t.name: GgufTensor(t.data, t.tensor_type) for t in file.tensors},
        )

    def tensor_at(self, name: str, level: WeightLevel) -> GgufTensor:
        """A tensor at a level; see `GgufTensor.at`."""
        if level in LOW_BIT_FORMATS and name in self.low_bits:
            return self.low_bits[name]
        return self.tensors[name].at(level, name)


def low_bit_tensors(llm: ElasticLLM, plan: Plan) -> dict[str, GgufTensor]:
    """The matrices of a live model at a plan's levels that GGUF files do not have, by their names.

    Args:
        llm: A model whose blocks are those of Llama; it makes these levels if they do not
            exist.
        plan: The plan.
    """
    low = {name: level for name, level in plan.levels.items() if level in LOW_BIT_FORMATS}
    heads = {"attn_q": int(llm.adapter.config.num_attention_heads), "attn_k": llm.adapter.kv_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, llm.adapter.num_layers)
    tensors = {}
    with llm.applied(Plan()):
        native = set(llm.model.modules())
    with llm.applied(Plan.of(low)):
        for module_name, module in llm.model.named_modules():
            if not isinstance(module, PackedModule) or module in native:
                continue
            tensor = GgufTensor.of_matrix(module.matrices["weight"])
            name = names.get_name(module_name)
            if part_heads := heads.get(name.split(".")[-1]):
                # The two halves of a head are rotated together; in llama.cpp their rows
                # alternate.
                rows, width = tensor.data.shape
                halves = tensor.data.reshape(part_heads, 2, -1, width).swapaxes(1, 2)
                tensor = GgufTensor(halves.reshape(rows, width), tensor.kind)
            tensors[f"{name}.weight"] = tensor
    return tensors


def export_gguf(model: GgufModel, plan: Plan, path: Path) -> dict[WeightLevel, list[GgufTensor]]:
    """Write a GGUF file of the architecture ``deci``.

    The file appears only when it is complete; an older one is replaced. Quantised tensors of
    a GGUF source are copied unless the plan lowers them. Levels of caches are settings of the
    engine and not in the file; see `cache_type` and `server_flags`.

    Args:
        model: The model; with `low_bits` if the plan has such levels.
        plan: The plan.
        path: The file to write.

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
    layers = deci_layers(model.num_layers, plan)
    tensors = list(_all_tensors(model, plan, layers))
    shape = deci_shape(layers, model.heads, model.kv_heads, model.ffn_length)
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, ARCHITECTURE)
        for key, (value, kind, inner) in model.entries.items():
            writer.add_key_value(key, value, kind, sub_type=inner)
        writer.add_block_count(len(layers))
        for name, numbers in shape.items():
            key = f"{ARCHITECTURE}.{name}"
            writer.add_key_value(key, numbers, Value.ARRAY, sub_type=Value.INT32)
        for _, name, tensor in tensors:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    written: dict[WeightLevel, list[GgufTensor]] = {}
    for level, _, tensor in tensors:
        written.setdefault(level, []).append(tensor)
    return written


_Leveled = tuple[WeightLevel, str, GgufTensor]
"""The level that the plan gives the item of a tensor, its name and the tensor."""


def _all_tensors(model: GgufModel, plan: Plan, layers: Sequence[DeciLayer]) -> Iterator[_Leveled]:
    for name in model.tensors:
        if not name.startswith("blk."):
            yield plan.embeddings, name, model.tensor_at(name, plan.embeddings)
    for number, layer in enumerate(layers):
        place, width = f"blk.{number}", model.hidden_size
        if layer.attn is not None:
            yield from _block(model, plan, 2 * layer.attn, place)
        elif number == 0:  # linear attention that adds nothing
            norm = GgufTensor(np.ones(width, np.float32), Kind.F32)
            yield "native", f"{place}.attn_norm.weight", norm
            yield "native", f"{place}.attn_output.weight", GgufTensor.small_zeros(width, width)
        if layer.ffn is not None:
            yield from _block(model, plan, 2 * layer.ffn + 1, place)
        else:  # an FFN block that adds nothing
            norm = GgufTensor(np.ones(width, np.float32), Kind.F32)
            yield "native", f"{place}.ffn_norm.weight", norm
            for part in ("ffn_gate", "ffn_up"):
                zeros = GgufTensor.zeros(ZERO_FFN_LENGTH, width)
                yield "native", f"{place}.{part}.weight", zeros
            zeros = GgufTensor.zeros(width, ZERO_FFN_LENGTH)
            yield "native", f"{place}.ffn_down.weight", zeros


def _block(model: GgufModel, plan: Plan, index: int, place: str) -> Iterator[_Leveled]:
    """The tensors of a kept block."""
    level, parts = plan.weight_level(index), _FFN_PARTS if index % 2 else _ATTN_PARTS
    for name in (f"{part}.{kind}" for part in parts for kind in ("weight", "bias")):
        own = f"blk.{index // 2}.{name}"
        if own in model.tensors:
            yield level, f"{place}.{name}", model.tensor_at(own, level)
