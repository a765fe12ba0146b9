"""Texts of random letters, whose kinds are easy to tell apart."""

from pathlib import Path

import numpy as np


def write_letters(folder: Path, name: str, letters: str, seed: int | None = None) -> str:
    """Write a text of 3,000 letters, and return its path; the seed is by default their number."""
    rng = np.random.default_rng(len(letters) if seed is None else seed)
    path = folder / f"{name}.txt"
    path.write_text("".join(rng.choice(list(letters), 3000)))
    return str(path)
