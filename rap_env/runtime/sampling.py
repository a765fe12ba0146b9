"""Sampling: each row draws its next token with transformers' warpers and its own random stream.

Shapes: B rows, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rap_env.errors import InvalidRequestError
from rap_env.llm.transfers import send


@dataclass(frozen=True)
class SamplingParams:
    """Length of the generation and sampling settings.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 means greedy decoding.
        top_p: Sample among the most likely tokens that together have this probability.
        top_k: Sample among this number of most likely tokens; 0 for all.
        seed: Seed of the random stream; None for a different stream each time.
        stop_token_ids: Tokens that end the answer; they are not part of it.

    Raises:
        InvalidRequestError: A value is out of its range.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        checks = (
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            ("temperature", _between(self.temperature, 0, 100), "from 0 to 100"),
            ("top_p", self.top_p > 0 and _between(self.top_p, 0, 1), "above 0 and at most 1"),
            ("top_k", _whole(self.top_k, 0), "a whole number of at least 0"),
            ("seed", self.seed is None or _whole(self.seed, -(2**63)), "a whole number or None"),
        )
        for name, valid, allowed in checks:
            if not valid:
                raise InvalidRequestError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1


class Sample(NamedTuple):
    """A token and its log-probability in nats under the model, before any warping."""

    token_id: int
    logprob: float


class RowSampler:
    """Draws the tokens of one row.

    Each row has its own random stream, so its tokens do not depend on other rows or on the time.
    Its numbers come from the CPU, so that a seed gives the same ones on any device.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._warpers: list[Any] = []
        if params.greedy:
            return
        if params.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def warped(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities for logits of shape (V,), in float64, (V,); not for greedy decoding."""
        scores = logits[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.softmax(scores[0].double(), dim=-1)

    def draw(self) -> float:
        """The next number of the row's random stream, from 0 to below 1."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))


def sample_rows(samplers: Sequence[RowSampler], logits: torch.Tensor) -> list[Sample | None]:
    """Sample the next token of each row.

    Args:
        samplers: One for each row.
        logits: (B, V), float32.

    Returns:
        A sample for each row; None where the logits are not finite.
    """
    chosen = logits.argmax(dim=-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawing:
        draws = torch.tensor([samplers[row].draw() for row in drawing], dtype=torch.float64)
        sums = torch.stack([samplers[row].warped(logits[row]) for row in drawing]).cumsum(dim=-1)
        # A token is drawn where its part of the sum has the number; tokens without have none.
        wanted = send(draws, logits.device)[:, None] * sums[:, -1:]
        drawn = torch.searchsorted(sums, wanted, right=True).clamp(max=logits.shape[1] - 1)
        for place, row in enumerate(drawing):
            chosen[row] = drawn[place, 0]
    scores = logits.gather(1, chosen[:, None]).squeeze(1)
    totals = torch.logsumexp(logits, dim=-1)
    found = torch.stack([chosen.double(), scores.double(), totals.double()], dim=1)
    return [  # read at once, since reading waits for the device
        Sample(int(token), score - total) if math.isfinite(total) else None
        for token, score, total in found.tolist()
    ]


def _whole(value: Any, least: int) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and value >= least


def _between(value: float, least: float, most: float) -> bool:
    return bool(least <= value <= most)
