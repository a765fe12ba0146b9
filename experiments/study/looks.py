"""Labels and colours of methods, kinds of blocks and levels, the same in all output."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

KIND_COLOURS = {"attn": "#2F6DB5", "ffn": "#E0812F"}
"""Colours of the two kinds of blocks."""

LEVEL_COLOURS = {
    "native": "#EDEBE4", "int8": "#BBD7EE", "int4": "#84B8DF", "int4-compact": "#5C9FD1",
    "int3": "#2F78B9", "int2": "#0F4680",
    "window512": "#FCE3A8", "int4-window512": "#F9BE5B", "int4-window256": "#EA8A24",
    "int4-window128": "#B25309", "removed": "#22262C",
}  # fmt: skip
"""Colours of levels, from the most to the least exact one: darker blues are fewer bits. Blue and
orange are told apart with any kind of colour vision."""


@dataclass(frozen=True)
class Look:
    """Appearance of a method in tables and figures.

    Attributes:
        label: Name in headings and legends.
        colour: Hex code.
        marker: matplotlib marker.
        what: Short description.
        learned: Whether the method was trained.
    """

    label: str
    colour: str
    marker: str
    what: str
    learned: bool = False


_LOOKS = {
    "rap": Look("RAP policy", "#F0001C", "*", "a trained network rates blocks or items", True),
    "maskable_ppo": Look("MaskablePPO", "#C8324B", "o", "trained policy", True),
    "ppo": Look("PPO", "#F2702E", "o", "trained policy", True),
    "masked_dqn": Look("Masked DQN", "#8E4FA8", "o", "trained policy", True),
    "dqn": Look("DQN", "#E377B8", "o", "trained policy", True),
    "greedy_per_byte": Look(
        "Greedy per byte", "#00707F", "s",
        "lowest ΔNLL per byte freed, measured again after each step",
    ),
    "oracle": Look("Oracle", "#12065E", "x", "the best of all masks, by brute force"),
    "frontier": Look("Frontier table", "#5B2BE0", "h", "lookup of the best known mask"),
    "score_model": Look(
        "Score model search", "#9C6ADE", "H", "changes of known plans that a predictor rates"
    ),
    "evolutionary": Look("Evolutionary", "#2FA52F", "p", "EvoPress: swaps at equal bytes"),
    "beam": Look("Beam search", "#2FC98A", "H", "several masks extended in parallel"),
    "greedy_swaps": Look(
        "Greedy with swaps", "#0B4A1E", "8", "greedy per byte, then swaps as long as they help"
    ),
    "uniform": Look(
        "Uniform settings", "#A33B8F", "*",
        "one level for all caches, one for all weights, then blocks in GSI order (as llama.cpp)",
    ),
    "rap-v0": Look("RAP-v0 on int8 caches", "#E06C75", "*", "the packaged policy over masks"),
    "gsi": Look("GSI order", "#2B4C9B", "D", "a fixed order, found by removing one by one"),
    "knapsack": Look("Knapsack", "#35A79C", "^", "best set if one-shot ΔNLL were additive"),
    "one_shot_per_byte": Look(
        "One-shot per byte", "#5C0A3C", "1", "order of ΔNLL per byte, measured once"
    ),
    "one_shot": Look("One-shot", "#7B9A2D", "v", "order of ΔNLL, measured once"),
    "block_influence": Look("Block influence", "#9A5F2C", "P", "ShortGPT's cosine score"),
    "shortgpt": Look("ShortGPT", "#F4A582", "d", "whole layers, by cosine score"),
    "sleb": Look("SLEB", "#3F86FF", "|", "whole layers, measured again after each removal"),
    "attention_only": Look("Attention only", "#6CAFE0", "<", "one-shot order, attn blocks only"),
    "ffn_only": Look("FFN only", "#D5A41C", ">", "one-shot order, ffn blocks only"),
    "random": Look("Random", "#8D9299", "X", "random steps until the request fits"),
    "dense": Look("Dense (nothing removed)", "#1F2328", "_", "the reference, with all blocks"),
}  # fmt: skip

_SPARE = ("#5B8C5A", "#B5651D", "#4B6C8B", "#A23B72", "#6B7A1E", "#7D5BA6")


def look(method: str) -> Look:
    """Return the appearance of a method; variants of an agent (``ppo-gamma=0.9``) differ."""
    if method in _LOOKS:
        return _LOOKS[method]
    base = max(
        (name for name in _LOOKS if re.match(rf"{re.escape(name)}\b", method)),
        key=len, default=None,
    )  # fmt: skip
    number = int(hashlib.sha256(method.encode()).hexdigest()[:8], 16)
    colour = _SPARE[number % len(_SPARE)]
    if base is None:
        return Look(method, colour, "d", "no description")
    parent = _LOOKS[base]
    label = f"{parent.label} {method[len(base) :].lstrip('-')}".strip()
    return Look(label, colour, "d", parent.what, parent.learned)


def short_label(method: str, length: int = 26) -> str:
    """Return the label of a method, shortened in the middle: variants differ at the end."""
    label = look(method).label
    if len(label) <= length:
        return label
    tail = (length - 2) // 2
    return f"{label[: length - 2 - tail]}..{label[-tail:]}"


def rank(method: str) -> int:
    """Return the position of a method in legends: learned ones, then baselines, then dense."""
    names = list(_LOOKS)
    if method in names:
        return names.index(method)
    for place, name in enumerate(names):
        if method.startswith(f"{name}-"):
            return place
    return len(names)
