"""Sampling: each row draws its next token with transformers' warpers and its own random stream.

Shapes: B rows, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rap_env.errors import InvalidGrammarError, InvalidRequestError
from rap_env.models.device import send
from rap_env.request import whole_number
from rap_env.runtime.structured_output import GrammarMatcher
from rap_env.specs import check, setting


@dataclass(frozen=True)
class SamplingParams:
    """Length of the generation and sampling settings.

    Attributes:
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits; 0 means greedy decoding.
        top_p: Sample among the most likely tokens that together have this probability.
        top_k: Sample among this number of most likely tokens; 0 for all.
        min_p: Sample among the tokens with at least this part of the likeliest one's probability.
        seed: Seed of the random stream; None for a different stream each time.
        stop_token_ids: Tokens that end the answer; they are not part of it.
        min_tokens: Tokens before which none of them is sampled, unless there is a constraint.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that
            the prompt or the answer has.
        presence_penalty: Subtracted from the logits of tokens that the answer has, in nats.
        frequency_penalty: Subtracted for each time that the answer has the token, in nats.
        logit_bias: Token ids, and what is added to their logits, in nats.
        top_logprobs: Number of most likely tokens to report with each token of the answer;
            None for no report of log-probabilities.
        prompt_logprobs: Whether to report the same for each token of the prompt.
        max_delta_nll: Floor of quality of the request, nats per token: no pass for it runs with
            a plan whose predicted rise in NLL is above it. None for the engine's floor alone,
            which holds in any case.
        constraint: Makes a matcher of what the answer has to follow; None for nothing.

    Raises:
        InvalidRequestError: A value is out of its range.
    """

    max_new_tokens: int = setting(16, low=1)
    temperature: float = setting(0.0, low=0, high=100)
    top_p: float = setting(1.0, above=0, high=1)
    top_k: int = setting(0, low=0)
    min_p: float = setting(0.0, low=0, high=1)
    seed: int | None = setting(None, low=-(2**63))
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = setting(0, low=0)
    repetition_penalty: float = setting(1.0, above=0)
    presence_penalty: float = setting(0.0, low=-2, high=2)
    frequency_penalty: float = setting(0.0, low=-2, high=2)
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = setting(None, low=0)
    prompt_logprobs: bool = False
    max_delta_nll: float | None = setting(None, low=0)
    constraint: Callable[[], GrammarMatcher] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        check(self)
        for token, bias in self.logit_bias:
            whole_number("A token of logit_bias", token, 0)
            if not -100 <= bias <= 100:
                raise InvalidRequestError(f"logit_bias must be from -100 to 100, not {bias!r}.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always sampled."""
        return self.temperature == 0 or self.top_k == 1


class Sample(NamedTuple):
    """A token and its log-probability in nats under the model, before any warping.

    `top` has the most likely tokens with their log-probabilities, most likely first, as many
    as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RowSampler:
    """Draws the tokens of one row.

    Each row has its own random stream, so its tokens do not depend on other rows or on the
    time. Its numbers come from the CPU, so that a seed gives the same ones on any device.

    Args:
        params: How to sample.
        prompt_ids: Tokens of the prompt.

    Attributes:
        error: Why no more tokens can be drawn, if the constraint failed.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._warpers: list[Any] = []
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        self._penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._seen = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1 else None
        self._min_tokens = params.min_tokens if params.constraint is None else 0
        self._matcher = None if params.constraint is None else params.constraint()
        self.error: str | None = None
        if params.greedy:
            return
        if params.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            self._warpers.append(MinPLogitsWarper(params.min_p))
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes the logits of the next token."""
        biased = self._matcher is not None or self.params.logit_bias or self._min_tokens > 0
        return bool(biased or self._seen or (self._penalised and self._counts))

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties and bias to logits of shape (V,), and exclude tokens."""
        if self._seen:
            index = send(torch.tensor([*self._seen]), logits.device)
            values, factor = logits[index], self.params.repetition_penalty
            logits[index] = torch.where(values < 0, values * factor, values / factor)
        if self._penalised and self._counts:
            tokens = list(self._counts)
            times = torch.tensor([self._counts[token] for token in tokens], dtype=logits.dtype)
            penalty = self.params.frequency_penalty * times + self.params.presence_penalty
            _add(logits, tokens, -penalty)
        if self.params.logit_bias:
            tokens, bias = map(list, zip(*self.params.logit_bias, strict=True))
            _add(logits, tokens, torch.tensor(bias, dtype=logits.dtype))
        if self._min_tokens > 0:
            stops = [token for token in self.params.stop_token_ids if token < len(logits)]
            logits[stops] = -math.inf
        if self._matcher is not None:
            try:
                allowed = send(self._matcher.allowed(), logits.device)
            except InvalidGrammarError as error:
                self.error = str(error)
            else:
                logits.masked_fill_(~allowed, -math.inf)

    def accept(self, token_id: int) -> None:
        """Note the token that was sampled."""
        if self._matcher is not None:
            self._matcher.accept(token_id)
        if self._penalised:
            self._counts[token_id] += 1
        self._min_tokens -= 1
        if self._seen is not None:
            self._seen[token_id] = None

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
        samplers: One for each row. They accept the token.
        logits: (B, V), float32.

    Returns:
        A sample for each row; None where the logits are not finite or the sampler has an
        error.
    """
    adjusting = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    scores = logits.clone() if adjusting else logits
    for row in adjusting:
        samplers[row].adjust(scores[row])
    chosen = scores.argmax(dim=-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawing:
        draws = torch.tensor([samplers[row].draw() for row in drawing], dtype=torch.float64)
        sums = torch.stack([samplers[row].warped(scores[row]) for row in drawing]).cumsum(dim=-1)
        # A token is drawn where its part of the sum has the number; tokens without have none.
        drawn_sums = send(draws, logits.device)[:, None] * sums[:, -1:]
        drawn = torch.searchsorted(sums, drawn_sums, right=True).clamp(max=logits.shape[1] - 1)
        for number, row in enumerate(drawing):
            chosen[row] = drawn[number, 0]
    samples = scored(logits, chosen, [sampler.params.top_logprobs or 0 for sampler in samplers])
    for row, (sampler, sample) in enumerate(zip(samplers, samples, strict=True)):
        if sampler.error is not None:
            samples[row] = None
        elif sample is not None:
            sampler.accept(sample.token_id)
    return samples


def scored(logits: torch.Tensor, tokens: torch.Tensor, top: Sequence[int]) -> list[Sample | None]:
    """The log-probabilities of tokens.

    Args:
        logits: (B, V), float32.
        tokens: One for each row, (B,), on the same device.
        top: Number of most likely tokens to report for each row.

    Returns:
        A sample for each row; None where the logits are not finite.
    """
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    totals = torch.logsumexp(logits, dim=-1)
    most = min(max(top, default=0), logits.shape[1])
    best = logits.topk(most, dim=-1)
    columns = [tokens[:, None], chosen[:, None], totals[:, None], best.indices, best.values]
    # Read at once, since reading waits for the device.
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()
    samples: list[Sample | None] = []
    for count, (token, score, total, *likely) in zip(top, rows, strict=True):
        pairs = zip(likely[:count], likely[most : most + count], strict=True)
        likeliest = tuple((int(other), value - total) for other, value in pairs)
        sample = Sample(int(token), score - total, likeliest)
        samples.append(sample if math.isfinite(total) else None)
    return samples


def _add(logits: torch.Tensor, tokens: Sequence[int], amounts: torch.Tensor) -> None:
    index = send(torch.tensor(tokens), logits.device)
    logits.index_add_(0, index, send(amounts, logits.device))
