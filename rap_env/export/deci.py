"""The layout of a pruned model in llama.cpp's architecture ``deci``. Without torch.

In ``deci`` each layer has its own number of heads and its own FFN length, so that a layer may have
only an attention or only an FFN block. Some layouts that its header can state are computed wrong or
rejected by llama.cpp, and must not be written:

- with an FFN length of 0 the whole layer is skipped, its attention block included;
- with an FFN length of 0 in the last layer the program aborts;
- without heads in layer 0 the file cannot be loaded, since the size of a head is read there.

So kept blocks are packed into new layers. The residual stream passes through all blocks in order,
and thus an attention block and the next FFN block may be of different layers if no other kept block
lies between. An attention block that is followed by another one gets an FFN block of zeros. If
the first layer has no attention block, it gets "linear attention" with a matrix of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rap_env.errors import UnsupportedModelError
from rap_env.plan import Plan

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

    @property
    def blocks(self) -> tuple[int, ...]:
        """Its blocks, by their indices in the base model."""
        attn = () if self.attn is None else (2 * self.attn,)
        return attn if self.ffn is None else (*attn, 2 * self.ffn + 1)


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
