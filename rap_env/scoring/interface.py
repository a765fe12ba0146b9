"""Callbacks of scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rap_env.plan import Plan

if TYPE_CHECKING:
    from tqdm import tqdm

OnScore = Callable[[Any], object]
"""Called with each plan after it was scored."""


def notify(on_score: OnScore | None, plans: Sequence[Plan]) -> None:
    """Call `on_score`, if there is one, for each plan."""
    if on_score is not None:
        for plan in plans:
            on_score(plan)


def bar_callback(bar: tqdm[Any]) -> OnScore:
    """A callback for `Scorer.nll_many` that advances a progress bar."""
    return lambda _plan: bar.update()
