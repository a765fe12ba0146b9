"""Whether what a soak gave was right, and whether its memory stayed where it was."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.soak.world import Answer
from rap_env.blocks import BlockMask
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.live import cache_argument

TIE_ROUNDINGS = 4.0
"""Roundings of the largest logit within which two logits count as equal: a batch adds up in another
order than one sequence, and each of a deep model's blocks rounds its sum."""
LEAST_TOLERANCE = 1e-3


@dataclass
class Agreement:
    """How answers agree with a fresh model under the same mask.

    Every token is compared after the tokens that were really before it, so one near-tie does not
    make all that follows look wrong.

    Attributes:
        answers: Answers that were computed again.
        tokens: Their tokens.
        masks: Masks that they were made under.
        near_ties: Greedy tokens that were not the fresh model's likeliest, but as likely up to
            rounding.
        wrong_tokens: Greedy tokens that were neither, and tokens whose log probability was another.
        wrong_answers: Answers with any.
        unstable: Answers that agree only within what the fresh model differs from itself, when it
            runs the text at once instead of token by token.
        worst_logprob: Largest difference of a log probability, in nats.
        control_wrong: Of as many answers compared under a mask with one block more or less, how
            many were found wrong; shows that the check sees such a difference.
        control_answers: How many those were.
    """

    answers: int = 0
    tokens: int = 0
    masks: int = 0
    near_ties: int = 0
    wrong_tokens: int = 0
    wrong_answers: int = 0
    unstable: int = 0
    worst_logprob: float = 0.0
    control_wrong: int = 0
    control_answers: int = 0

    def to_record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def agreement(fresh: ElasticLLM, answers: Sequence[Answer], *, controls: int = 40) -> Agreement:
    """Compute answers again with a model that took no part.

    Args:
        fresh: The same model, loaded anew.
        answers: What was kept.
        controls: How many are also compared under another mask.
    """
    found = Agreement()
    by_mask: dict[BlockMask, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_mask[answer.mask].append(answer)
    found.masks = len(by_mask)
    for mask, group in by_mask.items():
        with fresh.masked(mask):
            for answer in group:
                _compare(fresh, answer, found)
    for answer in answers[:controls]:
        other = BlockMask(answer.mask.indices ^ {fresh.num_blocks // 2})
        control = Agreement()
        with fresh.masked(other):
            _compare(fresh, answer, control)
        found.control_answers += 1
        found.control_wrong += control.wrong_answers
    return found


def _compare(fresh: ElasticLLM, answer: Answer, found: Agreement) -> None:
    logits = _token_by_token(fresh, answer)
    tolerance = TIE_ROUNDINGS * torch.finfo(fresh.dtype).eps * logits.abs().amax(dim=-1)
    tolerance = tolerance.clamp(min=LEAST_TOLERANCE)
    wrong, ties, apart = _differences(answer, logits, tolerance)
    if wrong.any():
        itself = (_at_once(fresh, answer) - logits).abs().amax(dim=-1)
        wrong, ties, apart = _differences(
            answer, logits, torch.maximum(tolerance, itself.cummax(dim=0).values)
        )
        found.unstable += not wrong.any()
    found.answers += 1
    found.tokens += len(answer.token_ids)
    found.near_ties += int(ties.sum())
    found.wrong_tokens += int(wrong.sum())
    found.wrong_answers += bool(wrong.any())
    found.worst_logprob = max(found.worst_logprob, float(apart.max()))


def _differences(
    answer: Answer, logits: torch.Tensor, tolerance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens are wrong, which are near-ties, and how far log probabilities are apart.

    Args:
        answer: An answer of T tokens.
        logits: Those of the fresh model, (T, V).
        tolerance: What counts as equal, (T,).
    """
    chosen = torch.tensor(answer.token_ids)[:, None]
    behind = logits.amax(dim=-1) - logits.gather(1, chosen)[:, 0]
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0]
    apart = (logprobs - torch.tensor(answer.logprobs)).abs()
    wrong = apart > tolerance
    ties = torch.zeros_like(wrong)
    if answer.greedy:
        wrong |= behind > tolerance
        ties = (behind > 0) & ~wrong
    return wrong, ties, apart


def _token_by_token(fresh: ElasticLLM, answer: Answer) -> torch.Tensor:
    """Logits for each token of an answer, (T, V), as plain generation computes them."""
    logits, cache = [], None
    pieces = [list(answer.prompt_ids), *([token] for token in answer.token_ids[:-1])]
    with torch.no_grad():
        for piece in pieces:
            output = fresh.model(
                input_ids=torch.tensor([piece], device=fresh.device),
                use_cache=True,
                **{cache_argument(fresh.model): cache},
            )
            cache = output.past_key_values
            logits.append(output.logits[0, -1].float().cpu())
    return torch.stack(logits)


def _at_once(fresh: ElasticLLM, answer: Answer) -> torch.Tensor:
    """The same logits, from one pass over the whole text."""
    ids = [*answer.prompt_ids, *answer.token_ids[:-1]]
    with torch.no_grad():
        output = fresh.model(input_ids=torch.tensor([ids], device=fresh.device), use_cache=False)
    logits: torch.Tensor = output.logits[0, len(answer.prompt_ids) - 1 :].float().cpu()
    return logits


def resident_bytes(process: Path = Path("/proc/self/status")) -> int:
    """Resident memory of this process, or the most so far where the system tells no more."""
    try:
        line = next(line for line in process.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(samples: Sequence[int]) -> float:
    """By how much the median of the last tenth exceeds that of the second, as a fraction.

    Args:
        samples: Bytes in order of time; with fewer than ten, a tenth is one.
    """
    if len(samples) < 3:
        return 0.0
    tenth = max(1, len(samples) // 10)
    early = statistics.median(samples[tenth : 2 * tenth])
    late = statistics.median(samples[-tenth:])
    return late / early - 1
