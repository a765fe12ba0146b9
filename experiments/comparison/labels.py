"""What each method and repair is called and how it looks, the same everywhere."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

TIMES = "\N{MULTIPLICATION SIGN}"
"""Between batch and tokens, in words for people."""

KIND_COLOURS = {"attn": "#2F6DB5", "ffn": "#E0812F"}
"""Colours of the two kinds of blocks."""


@dataclass(frozen=True)
class Look:
    """How a method is shown.

    Attributes:
        label: Its name for people.
        colour: Its colour, as a hex code.
        marker: Its matplotlib marker.
        what: What it does, in a few words.
        learned: Whether it was trained.
    """

    label: str
    colour: str
    marker: str
    what: str
    learned: bool = False


_LOOKS = {
    "rap": Look("RAP policy", "#F0001C", "*", "block-wise policy, learned", True),
    "maskable_ppo": Look("MaskablePPO", "#C8324B", "o", "trained policy", True),
    "ppo": Look("PPO", "#F2702E", "o", "trained policy", True),
    "masked_dqn": Look("Masked DQN", "#8E4FA8", "o", "trained policy", True),
    "dqn": Look("DQN", "#E377B8", "o", "trained policy", True),
    "greedy_per_byte": Look(
        "Greedy per byte", "#00707F", "s",
        "least loss rise per byte freed, measured again after each removal",
    ),
    "oracle": Look("Oracle", "#12065E", "x", "the best of all masks, by brute force"),
    "frontier": Look("Frontier table", "#5B2BE0", "h", "look-up of the best known mask"),
    "evolutionary": Look("Evolutionary", "#2FA52F", "p", "EvoPress: switches at equal bytes"),
    "beam": Look("Beam search", "#2FC98A", "H", "several masks grown side by side"),
    "greedy_swaps": Look(
        "Greedy with swaps", "#0B4A1E", "8", "greedy per byte, then swaps as long as they help"
    ),
    "gsi": Look("GSI order", "#2B4C9B", "D", "a fixed order, found by removing one by one"),
    "knapsack": Look("Knapsack", "#35A79C", "^", "best set if one-shot loss rises added up"),
    "one_shot_per_byte": Look(
        "One-shot per byte", "#5C0A3C", "1", "order of loss rise per byte, measured once"
    ),
    "one_shot": Look("One-shot", "#7B9A2D", "v", "order of loss rise, measured once"),
    "block_influence": Look("Block influence", "#9A5F2C", "P", "ShortGPT's cosine score"),
    "shortgpt": Look("ShortGPT", "#F4A582", "d", "whole layers, by cosine score"),
    "sleb": Look("SLEB", "#3F86FF", "|", "whole layers, measured again after each removal"),
    "attention_only": Look("Attention only", "#6CAFE0", "<", "one-shot order, attn blocks only"),
    "ffn_only": Look("FFN only", "#D5A41C", ">", "one-shot order, ffn blocks only"),
    "random": Look("Random", "#8D9299", "X", "random blocks until the request fits"),
    "dense": Look("Dense (nothing removed)", "#1F2328", "_", "the reference; needs all its memory"),
    "none": Look("No stubs", "#7C838A", "o", "removed blocks leave nothing"),
    "library": Look("Library", "#2A78C2", "o", "stubs fitted once, for any mask"),
    "distilled": Look("Distilled library", "#159A74", "o", "the library, trained on dense outputs"),
    "per_mask": Look("Fitted per mask", "#E09A1A", "o", "stubs fitted anew for each mask"),
}  # fmt: skip

_SPARE = ("#5B8C5A", "#B5651D", "#4B6C8B", "#A23B72", "#6B7A1E", "#7D5BA6")


def look(method: str) -> Look:
    """The look of a method; variants of an agent (``ppo-gamma=0.9``) get one of their own."""
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
    """The label of a method, cut in its middle where it is longer: the end tells variants apart."""
    label = look(method).label
    if len(label) <= length:
        return label
    tail = (length - 2) // 2
    return f"{label[: length - 2 - tail]}..{label[-tail:]}"


def rank(method: str) -> int:
    """Place of a method in legends: learned ones first, then baselines, dense last."""
    names = list(_LOOKS)
    for place, name in enumerate(names):
        if method == name or method.startswith(f"{name}-"):
            return place
    return len(names)
