"""How far two orders of importance agree: Kendall's tau and the overlap of their first blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from experiments.studies.rows import OrderRow


@dataclass(frozen=True)
class Agreement:
    """Two orders of one method, on two texts or on two draws of one.

    Attributes:
        method: ``"one_shot"`` or ``"gsi"``.
        texts: Names of the two texts; the same name twice for two draws of one.
        seeds: Seeds of their windows.
        tau: Kendall's tau-b, in [-1, 1].
        overlaps: By k: the share of the first k blocks that both have, in [0, 1].
    """

    method: str
    texts: tuple[str, str]
    seeds: tuple[int, int]
    tau: float
    overlaps: dict[int, float]

    @property
    def same_text(self) -> bool:
        """Whether only the draw of the windows differs."""
        return self.texts[0] == self.texts[1]


def agreements(orders: Sequence[OrderRow], top: Sequence[int]) -> Iterator[Agreement]:
    """Every pair of orders of the same method.

    Args:
        orders: The orders.
        top: Numbers of first blocks that are compared; those beyond what both orders measured
            are left out.
    """
    for one, two in combinations(orders, 2):
        if one.method == two.method:
            known = min(one.measured, two.measured)
            yield Agreement(
                one.method,
                (one.searched_on, two.searched_on),
                (one.seed, two.seed),
                kendall_tau(one.values, two.values),
                {k: overlap(one.order, two.order, k) for k in top if k <= known},
            )


def kendall_tau(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Kendall's rank correlation of two lists of numbers, tau-b: ties lessen it.

    Source: Kendall (1945), The treatment of ties in ranking problems. With C and D the numbers
    of pairs that both lists order the same way and the opposite way, and T_i those that list i
    does not tie: tau = (C - D) / sqrt(T_1 T_2).

    Args:
        first: Shape (N,).
        second: Shape (N,).

    Returns:
        From -1 (reversed) to 1 (the same order); 0 where a list ties everything.

    Raises:
        ValueError: The lists differ in length, or have fewer than two numbers.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 1 or len(one) < 2:
        raise ValueError(
            f"Kendall's tau needs two lists of one length, two numbers at least; got shapes "
            f"{one.shape} and {two.shape}."
        )
    pairs = np.triu_indices(len(one), 1)
    signs = [np.sign(values[pairs[0]] - values[pairs[1]]) for values in (one, two)]
    untied = [float(np.abs(sign).sum()) for sign in signs]
    return (
        float(signs[0] @ signs[1]) / float(np.sqrt(untied[0] * untied[1])) if all(untied) else 0.0
    )


def overlap(first: Sequence[str], second: Sequence[str], k: int) -> float:
    """Share of the first `k` entries that two orders have in common, in whatever order."""
    return len(set(first[:k]) & set(second[:k])) / k
