"""A plan in llama.cpp: its layout in a file, and its settings. Without torch.

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

from collections.abc import Sequence
from dataclasses import dataclass

from rap_env.errors import UnsupportedModelError
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
