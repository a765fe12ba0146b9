"""A plan in llama.cpp: its layout in a file, its settings, and static deployments. Without torch.

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

llama.cpp serves one file with one format of caches for all layers, and changes neither while
it runs. A deployment is the mask and the format with the least predicted rise in NLL whose
bytes fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rap_env.errors import InfeasibleBudgetError, UnsupportedModelError
from rap_env.importance.plan_table import PlanTable
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.policies.packaged_files import (
    default_facts,
    delta_nll_from_scores,
    packaged_file,
    packaged_scores,
)
from rap_env.request import Request, human_bytes

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

BATCHES = (256, 128, 64, 32)
"""Tokens of a batch in llama.cpp (``-b`` and ``-ub``), which determine its compute buffer."""

_PADDING = 256  # llama.cpp rounds the context of a sequence up to a multiple
_FLOAT = 4


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


def cache_flags(cache: str) -> str:
    """llama.cpp's options for caches in a format; quantised values need flash attention."""
    return f"-ctk {cache} -ctv {cache}{'' if cache == 'f16' else ' -fa on'}"


@dataclass(frozen=True)
class CacheType:
    """A format of caches in llama.cpp.

    Attributes:
        name: As ``-ctk`` and ``-ctv`` take it.
        bits: Bits of a value, scales included.
        delta_nll: Rise in NLL with it, measured with the default model in llama.cpp against
            the unquantised model here, nats per token.
    """

    name: str
    bits: float
    delta_nll: float


CACHE_TYPES = (
    CacheType("f16", 16, 0.0033),
    CacheType("q8_0", 8.5, 0.0043),
    CacheType("q5_1", 6, 0.0097),
    CacheType("q4_1", 5, 0.0347),
    CacheType("q4_0", 4.5, 0.0468),
)
"""Formats of caches, from the most to the least exact one."""


@dataclass(frozen=True)
class Deployment:
    """A model file and llama.cpp's settings for a request.

    Attributes:
        mask: The removed blocks.
        cache: The format of caches.
        batch_tokens: Tokens of a batch.
        request: The request.
        bytes: Predicted bytes of weights, KV cache and compute buffers.
        delta_nll: Predicted rise in NLL, nats per token.
        source: Where that is from.
    """

    mask: Plan
    cache: CacheType
    batch_tokens: int
    request: Request
    bytes: dict[str, int]
    delta_nll: float
    source: str

    @property
    def peak_bytes(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    @property
    def flags(self) -> str:
        """Options of ``llama-server``."""
        rows = self.request.batch_size
        context = rows * _padded(self.request.seq_len_tokens)
        return (
            f"{cache_flags(self.cache.name)} -c {context} -np {rows} "
            f"-b {self.batch_tokens} -ub {self.batch_tokens}"
        )


def choose_deployment(memory: MemoryModel, request: Request) -> Deployment:
    """The deployment of the least predicted rise in NLL that fits a request's budget.

    Of equal ones, it is the one with the fewest removed blocks and the largest batch. Masks
    are those of the packaged frontier for the default model; for others only the dense one.
    Their rise is that of the package's score table of the default model's file, as in
    `find_delta_nll`.

    Raises:
        InfeasibleBudgetError: None fits.
    """
    facts = memory.facts
    masks, source = _known_masks(facts)
    deployments = []
    for mask, rise in masks:
        if mask.count_removed("attn") == facts.num_blocks // 2:
            continue  # llama.cpp needs an attention block
        sizes_of_mask = file_sizes(facts, mask)
        for cache in CACHE_TYPES:
            for batch in BATCHES:
                sizes = deployment_bytes(facts, sizes_of_mask, cache, request, batch)
                lost = rise + cache.delta_nll
                deployments.append(Deployment(mask, cache, batch, request, sizes, lost, source))
    fitting = [d for d in deployments if d.peak_bytes <= request.budget_bytes]
    if not fitting:
        least = min(d.peak_bytes for d in deployments)
        raise InfeasibleBudgetError(
            "No deployment in llama.cpp that is known fits into "
            f"{human_bytes(request.budget_bytes)}; the smallest one needs {human_bytes(least)}."
        )
    return min(fitting, key=lambda d: (d.delta_nll, len(d.mask.removed), -d.batch_tokens))


def file_sizes(facts: ModelFacts, mask: Plan) -> tuple[int, int]:
    """The sizes of a file that depend on the mask alone.

    Returns:
        Bytes of the weights in llama.cpp's file, blocks of zeros included, and the number of
        values that one token adds to the KV cache.
    """
    width, layers = facts.hidden_size, deci_layers(facts.num_blocks // 2, mask)
    kept = sum(n for i, n in enumerate(facts.block_param_bytes) if i not in mask.removed)
    no_ffn = (1 + 3 * ZERO_FFN_LENGTH) * width * _FLOAT
    weights = facts.base_bytes + kept + no_ffn * sum(layer.ffn is None for layer in layers)
    if layers[0].attn is None:
        weights += width * _FLOAT + width * width * 18 // 32  # a norm, and zeros in Q4_0
    sizes = zip(facts.kv_heads, facts.kv_head_size, strict=True)
    cached = (2 * n * size for i, (n, size) in enumerate(sizes) if 2 * i not in mask.removed)
    return weights, sum(cached)


def deployment_bytes(
    facts: ModelFacts,
    sizes_of_mask: tuple[int, int],
    cache: CacheType,
    request: Request,
    batch_tokens: int,
) -> dict[str, int]:
    """Bytes of weights, KV cache and compute buffers for a request, given `file_sizes`.

    The buffers hold, for each token of a batch, logits, the widest activations, and a row of
    the attention mask in float16; and the logits of one token of each sequence.
    """
    weights, cached_values = sizes_of_mask
    tokens = _padded(request.seq_len_tokens)
    by_token = (facts.vocab_size + 2 * facts.ffn_width) * _FLOAT + 2 * tokens
    logits = request.batch_size * facts.vocab_size * _FLOAT
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": round(request.batch_size * tokens * cached_values * cache.bits / 8),
        "compute_bytes": min(batch_tokens, request.seq_len_tokens) * by_token + logits,
    }


def _padded(tokens: int) -> int:
    return -(-tokens // _PADDING) * _PADDING


def _known_masks(facts: ModelFacts) -> tuple[Iterable[tuple[Plan, float]], str]:
    """Masks with their rise in NLL, and where it is from."""
    caches = "caches measured with the default model in llama.cpp"
    known = {weights: default_facts(weights) for weights in ("native", "bf16")}
    if facts.fingerprint in {each.fingerprint for each in known.values()}:
        frontier = PlanTable.load(packaged_file("frontier.json"), MemoryModel(known["bf16"]))
        # A file for llama.cpp has the native weights.
        scores = packaged_scores(MemoryModel(known["native"]))
        masks = dict.fromkeys([Plan(), *dict(frontier.entries)])
        predicted = [(mask, delta_nll_from_scores(scores, mask)[0]) for mask in masks]
        return predicted, f"masks predicted from {len(scores.scores)} measured plans, {caches}"
    return [(Plan(), 0.0)], f"the dense model, {caches}"
