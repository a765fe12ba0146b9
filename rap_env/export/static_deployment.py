"""The static deployment in llama.cpp that fits a budget: a mask and one format of caches.

llama.cpp serves one file with one format of caches for all layers, and changes neither while it
runs. The choice is the pair with the least predicted rise in NLL whose bytes fit. Without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rap_env.errors import InfeasibleBudgetError
from rap_env.export.deci import ZERO_FFN_LENGTH, deci_layers
from rap_env.export.llama_cpp import cache_flags
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.policies.loading import FrontierPolicy, default_facts, load_policy
from rap_env.request import Request

BATCHES = (256, 128, 64, 32)
"""Tokens of a batch in llama.cpp (``-b`` and ``-ub``), which determine its compute buffer."""

_PADDING = 256  # llama.cpp rounds the context of a sequence up to a multiple
_FLOAT = 4


@dataclass(frozen=True)
class CacheType:
    """A format of caches in llama.cpp.

    Attributes:
        name: As ``-ctk`` and ``-ctv`` take it.
        bits: Bits of a value, scales included.
        delta_nll: Rise in NLL with it, measured with the default model in llama.cpp against the
            unquantised model here (``results/ladder/llama_cpp``), nats per token.
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

    Of equal ones, it is the one with the fewest removed blocks and the largest batch. Masks are
    those of the packaged frontier for the default model; for others only the dense one. A measured
    gain by a removed block counts as no rise.

    Raises:
        InfeasibleBudgetError: None fits.
    """
    facts, found = memory.facts, []
    masks, source = _known_masks(facts)
    for mask, rise in masks:
        if mask.count_removed("attn") == facts.num_blocks // 2:
            continue  # llama.cpp needs an attention block
        held = MaskBytes.of(facts, mask)
        for cache in CACHE_TYPES:
            for batch in BATCHES:
                sizes = held.with_request(facts, cache, request, batch)
                lost = max(rise, 0.0) + cache.delta_nll
                found.append(Deployment(mask, cache, batch, request, sizes, lost, source))
    fitting = [one for one in found if one.peak_bytes <= request.budget_bytes]
    if not fitting:
        least = min(one.peak_bytes for one in found)
        raise InfeasibleBudgetError(
            f"No deployment in llama.cpp that is known fits into {request.budget_bytes:,} bytes; "
            f"the smallest one needs {least:,}."
        )
    return min(fitting, key=lambda one: (one.delta_nll, len(one.mask.removed), -one.batch_tokens))


@dataclass(frozen=True)
class MaskBytes:
    """What depends on the mask alone.

    Attributes:
        weights: Bytes of the weights in llama.cpp's file, blocks of zeros included.
        cached_values: Values that one token adds to the KV cache.
    """

    weights: int
    cached_values: int

    @classmethod
    def of(cls, facts: ModelFacts, mask: Plan) -> MaskBytes:
        """The bytes of a mask."""
        width, layers = facts.hidden_size, deci_layers(facts.num_blocks // 2, mask)
        kept = sum(n for i, n in enumerate(facts.block_param_bytes) if i not in mask.removed)
        no_ffn = (1 + 3 * ZERO_FFN_LENGTH) * width * _FLOAT
        weights = facts.base_bytes + kept + no_ffn * sum(layer.ffn is None for layer in layers)
        if layers[0].attn is None:
            weights += width * _FLOAT + width * width * 18 // 32  # a norm, and zeros in Q4_0
        sizes = zip(facts.kv_heads, facts.kv_head_size, strict=True)
        values = sum(
            2 * heads * size
            for layer, (heads, size) in enumerate(sizes)
            if 2 * layer not in mask.removed
        )
        return cls(weights, values)

    def with_request(
        self, facts: ModelFacts, cache: CacheType, request: Request, batch_tokens: int
    ) -> dict[str, int]:
        """Bytes of weights, KV cache and compute buffers for a request.

        The buffers hold, for each token of a batch, logits, the widest activations, and a row of
        the attention mask in float16; and the logits of one token of each sequence.
        """
        tokens = _padded(request.seq_len_tokens)
        by_token = (facts.vocab_size + 2 * facts.ffn_width) * _FLOAT + 2 * tokens
        logits = request.batch_size * facts.vocab_size * _FLOAT
        cached = request.batch_size * tokens * self.cached_values * cache.bits / 8
        return {
            "weights_bytes": self.weights,
            "kv_cache_bytes": round(cached),
            "compute_bytes": min(batch_tokens, request.seq_len_tokens) * by_token + logits,
        }


def _padded(tokens: int) -> int:
    return -(-tokens // _PADDING) * _PADDING


def _known_masks(facts: ModelFacts) -> tuple[Iterable[tuple[Plan, float]], str]:
    """Masks with their rise in NLL, and where it is from."""
    caches = "caches measured with the default model in llama.cpp"
    known = {weights: default_facts(weights) for weights in ("native", "bf16")}
    if facts.fingerprint in {each.fingerprint for each in known.values()}:
        policy = load_policy("frontier", MemoryModel(known["bf16"]))
        assert isinstance(policy, FrontierPolicy)
        frontier = policy.frontier
        text = frontier.provenance["text"]
        tokens = text["windows"] * text["window_tokens"]
        masks = {Plan(): 0.0, **dict(frontier.entries)}
        return masks.items(), f"masks measured on {tokens} tokens of {text['source']}, {caches}"
    return [(Plan(), 0.0)], f"the dense model, {caches}"
