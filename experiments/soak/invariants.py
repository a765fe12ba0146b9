"""Invariants of a soak test: answers equal those of a fresh model, and memory does not grow."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.soak.recording import Answer
from rap_env.blocks import BlockMask
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import CompressionPlan

TIE_ROUNDINGS = 4.0
"""Two logits count as equal within so many roundings of the largest logit: a batch sums in another
order than a single sequence, and each block rounds its sum."""
MIN_TOLERANCE = 1e-3


@dataclass
class AnswerCheck:
    """Comparison of answers with a fresh model under the same plan.

    Each token is compared given the tokens that actually precede it, so a near-tie does not make
    the following tokens count as wrong.

    Attributes:
        answers: Answers that were recomputed.
        tokens: Their tokens.
        masks: Their different plans.
        near_ties: Greedy tokens that are not the most likely token of the fresh model, but equally
            likely up to rounding.
        wrong_tokens: Other greedy tokens that differ, and tokens whose log probability differs.
        wrong_answers: Answers with a wrong token.
        unstable: Answers that agree only within the difference of the fresh model from itself
            between one pass over the text and token-by-token generation.
        worst_logprob: Largest difference of a log probability, in nats.
        control_wrong: Wrong answers among controls, which are compared under a plan that differs
            in one block; shows that the check detects such a difference.
        control_answers: Number of controls.
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


def check_answers(
    fresh: ElasticLLM, answers: Sequence[Answer], *, controls: int = 40
) -> AnswerCheck:
    """Recompute answers with a model that did not serve them.

    Args:
        fresh: The same model, loaded again.
        answers: The sampled answers.
        controls: Number of answers that are also compared under another plan.
    """
    found = AnswerCheck()
    by_plan: dict[CompressionPlan, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_plan[answer.plan].append(answer)
    found.masks = len(by_plan)
    for plan, group in by_plan.items():
        with fresh.masked(plan):
            for answer in group:
                _compare(fresh, answer, found)
    for answer in answers[:controls]:
        other = replace(
            answer.plan,
            removed=BlockMask(answer.plan.removed.indices ^ {fresh.num_blocks // 2}),
        )
        control = AnswerCheck()
        with fresh.masked(other):
            _compare(fresh, answer, control)
        found.control_answers += 1
        found.control_wrong += control.wrong_answers
    return found


def _compare(fresh: ElasticLLM, answer: Answer, found: AnswerCheck) -> None:
    logits = _token_by_token(fresh, answer)
    tolerance = TIE_ROUNDINGS * torch.finfo(fresh.dtype).eps * logits.abs().amax(dim=-1)
    tolerance = tolerance.clamp(min=MIN_TOLERANCE)
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
    """Return which tokens are wrong or near-ties, and the differences of log probabilities.

    Args:
        answer: An answer of T tokens.
        logits: Logits of the fresh model, (T, V).
        tolerance: Largest difference that counts as equal, (T,).
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
    """Return the logits for each token of an answer, (T, V), from token-by-token generation."""
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
    """Return the same logits from one pass over the whole text."""
    ids = [*answer.prompt_ids, *answer.token_ids[:-1]]
    with torch.no_grad():
        output = fresh.model(input_ids=torch.tensor([ids], device=fresh.device), use_cache=False)
    logits: torch.Tensor = output.logits[0, len(answer.prompt_ids) - 1 :].float().cpu()
    return logits


def resident_bytes(process: Path = Path("/proc/self/status")) -> int:
    """Resident memory of this process; its maximum so far on systems without ``/proc``."""
    try:
        line = next(line for line in process.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_growth(samples: Sequence[int]) -> float:
    """Relative growth from the median of the second tenth to that of the last tenth.

    Args:
        samples: Bytes in order of time; with fewer than ten samples, a tenth is one sample.
    """
    if len(samples) < 3:
        return 0.0
    tenth = max(1, len(samples) // 10)
    early = statistics.median(samples[tenth : 2 * tenth])
    late = statistics.median(samples[-tenth:])
    return late / early - 1
