"""Settings of the ladder: what is compared, and llama.cpp's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from experiments.config.common import (
    Count,
    Fraction,
    Section,
    ShapeText,
    TextConfig,
    among,
    form,
    some,
    within,
)
from rap_env.levels import WEIGHT_LEVELS, CacheLevel

LLAMA_CPP_CACHES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Formats of llama.cpp's cache, from the most to the least exact one."""


@dataclass
class LadderConfig(Section):
    """Requests, levels and budgets that ``experiments.ladder`` compares on ``evaluate.text``."""

    section = "ladder"
    requests: Annotated[list[ShapeText], some] = field(
        default_factory=lambda: ["1x128", "4x512", "8x2048", "16x4096"]
    )
    """Batch size x sequence length in tokens."""
    weights: list[Annotated[str, among(*WEIGHT_LEVELS[:-1])]] = field(
        default_factory=lambda: ["native", "int8", "int4"]
    )
    """Levels of all weights in uniform settings."""
    caches: list[Annotated[str, form(CacheLevel.of)]] = field(
        default_factory=lambda: ["native", "int8", "int4", "int2", "window512"]
    )
    """Levels of all caches in uniform settings."""
    removal: str | None = "frontier"
    """Policy that only removes blocks: a baseline, or what `rap_env.load_policy` takes; null for
    none."""
    removal_budgets: list[Fraction] = field(default_factory=lambda: [0.95, 0.9, 0.8, 0.7, 0.6])
    """Its budgets, as fractions of the unquantised model's peak bytes."""
    knapsack: str | None = "knapsack"
    """Policy over the levels of all items: what `rap_env.load_policy` takes; null for none."""
    budgets: list[Fraction] = field(
        default_factory=lambda: [0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2]
    )
    """Its budgets."""
    windows: Count | None = None
    """Windows of the text; null for those of ``evaluate.text``."""
    window_tokens: Annotated[int, within(2)] | None = None
    """Tokens of a window; null for those of ``evaluate.text``."""
    llama_cpp_caches: list[Annotated[str, among(*LLAMA_CPP_CACHES)]] = field(
        default_factory=lambda: ["f16", "q8_0", "q5_1", "q4_1", "q4_0"]
    )
    """Formats of llama.cpp's cache; weights are those of the file."""
    llama_cpp_threads: Count = 1
    """Threads of llama.cpp; they change only the duration."""

    def text_of(self, text: TextConfig) -> TextConfig:
        """The text to measure on: a given one with these windows."""
        return replace(
            text,
            windows=self.windows or text.windows,
            window_tokens=self.window_tokens or text.window_tokens,
        )
