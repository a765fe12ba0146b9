"""Facts about a model that the byte arithmetic needs. Plain values without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from rap_env.artifacts import with_tuples
from rap_env.levels import WEIGHT_LEVELS, WeightLevel
from rap_env.plan import block_name


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model that the arithmetic needs (L layers, 2L blocks).

    Attributes:
        name: The user's name for the model.
        fingerprint: SHA-256 over the weights and the config, in hex.
        dtype: Name of the weights' dtype, such as ``"bfloat16"``.
        block_param_bytes: Bytes of each block's own tensors, shape (2L,).
        base_bytes: Bytes of everything else (embeddings, head, last norm), tied tensors once.
        kv_bytes_per_token: Bytes that one token of one sequence adds to each layer's cache,
            (L,).
        kv_window_tokens: Most tokens that each layer's cache holds (sliding window), or None,
            (L,).
        itemsize: Bytes of one activation value.
        hidden_size: Width of the residual stream.
        ffn_width: Widest hidden activation of a feed-forward block for one token.
        vocab_size: Number of entries of the head.
        max_positions: Longest sequence the model accepts, in tokens.
        weights: The format of native weights: ``"unquantised"``, or what packed ones came
            from, such as ``"packed"``.
        level_param_bytes: For each packed level the bytes of each block, (2L,); 0 where a
            block has no such level below its native one. A level that no block has may be
            absent.
        level_base_bytes: As `base_bytes` at each packed level that embeddings and head have.
        widen_bytes: Bytes of the buffer into which packed weights are widened, one matrix at
            a time.
        calibration: Hash of the text with which weights of few bits are made, in hex; empty
            without one.
        kv_heads: Key and value heads of each layer, (L,); empty if caches have no levels.
        kv_head_size: Channels of a key or value head of each layer, (L,).
    """

    name: str
    fingerprint: str
    dtype: str
    block_param_bytes: tuple[int, ...]
    base_bytes: int
    kv_bytes_per_token: tuple[int, ...]
    kv_window_tokens: tuple[int | None, ...]
    itemsize: int
    hidden_size: int
    ffn_width: int
    vocab_size: int
    max_positions: int
    weights: str = "unquantised"
    level_param_bytes: Mapping[WeightLevel, tuple[int, ...]] = field(default_factory=dict)
    level_base_bytes: Mapping[WeightLevel, int] = field(default_factory=dict)
    widen_bytes: int = 0
    kv_heads: tuple[int, ...] = ()
    kv_head_size: tuple[int, ...] = ()
    calibration: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelFacts:
        """Facts from the JSON form of their fields, whose tuples are lists; no other is read."""
        own = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        blocks = own.get("level_param_bytes", {})
        return cls(**{**with_tuples(own), "level_param_bytes": with_tuples(blocks)})

    @property
    def identity(self) -> dict[str, str]:
        """Identity of the model in scores: weights, their dtype and the calibration of levels."""
        own = {"model": self.fingerprint, "dtype": self.dtype}
        if self.weights != "unquantised":
            own["weights"] = self.weights
        if self.calibration:
            own["calibration"] = self.calibration
        return own

    @property
    def packed(self) -> bool:
        """Whether native weights are packed."""
        return self.weights != "unquantised"

    def weight_levels(self, index: int) -> dict[WeightLevel, int]:
        """The levels of a block's weights that exist, from native down, with their bytes."""
        sizes = {level: blocks[index] for level, blocks in self.level_param_bytes.items()}
        sizes["native"] = self.block_param_bytes[index]
        levels = {level: sizes[level] for level in WEIGHT_LEVELS if sizes.get(level)}
        return {**levels, "removed": 0}

    def without_levels(self, levels: Collection[str]) -> ModelFacts:
        """The same model without some packed levels."""
        blocks = {n: sizes for n, sizes in self.level_param_bytes.items() if n not in levels}
        others = {n: size for n, size in self.level_base_bytes.items() if n not in levels}
        return replace(self, level_param_bytes=blocks, level_base_bytes=others)

    def blocks_at(self, level: WeightLevel) -> dict[str, str]:
        """The level for each block that has it, by name: what `Plan.of` takes."""
        having = (i for i in range(self.num_blocks) if level in self.weight_levels(i))
        return {block_name(index): level for index in having}

    @property
    def embedding_levels(self) -> dict[WeightLevel, int]:
        """The levels of embeddings and head that exist, with the bytes outside all blocks."""
        sizes = {"native": self.base_bytes, **self.level_base_bytes}
        return {level: sizes[level] for level in WEIGHT_LEVELS if level in sizes}

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.kv_bytes_per_token)

    @property
    def num_blocks(self) -> int:
        """2L: each layer has an attn and an ffn block."""
        return len(self.block_param_bytes)


class HasFacts(Protocol):
    """A live model that provides its facts, such as `rap_env.models.ElasticLLM`."""

    @property
    def facts(self) -> ModelFacts:
        """The properties that the arithmetic needs."""
