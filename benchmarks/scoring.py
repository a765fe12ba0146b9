"""Scoring against full forward passes of a plain model: ``python -m benchmarks.scoring``.

Record ``nll_many``: all plans of episodes, as an agent with a reward at each step scores
them, are scored at once. Record ``gsi``: exact and lazy GSI against the naive loop over all
candidates.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import ModelSettings, open_model, target, write_record
from experiments.study.console import run_with_settings
from rap_env.importance.gsi_search import gsi
from rap_env.importance.profiles import GSIProfile
from rap_env.memory import MemoryModel
from rap_env.models.files.sources import locate
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer

_EACH = "one full forward of a plain model for each"
_TOLERANCE = 1e-3  # a plain model's loss sums in another order

Scored = tuple[float, float]
"""Seconds and NLL of a plan."""


@dataclass
class ScoringSettings(ModelSettings):
    """Settings of this benchmark."""

    windows: int = 8
    window_tokens: int = 128
    plans: int = 256
    """Number of plans to score."""
    removals: int = 24
    """Blocks that GSI removes."""


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoFFN(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NaiveModel:
    """A plain Llama-like model and the text that plans are scored on by a full forward pass.

    Removed blocks return zeros, the pass computes all logits, and the loss is torch's own
    over all of them at once in float32, as in the code of SLEB, ShortGPT and BlockPruner.

    Args:
        tokens: Token ids, shape (windows, T).
    """

    def __init__(self, folder: str, dtype: torch.dtype, device: str, tokens: torch.Tensor) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model, self._tokens = model.eval().to(device), tokens.to(device)
        self._kept = [(layer.self_attn, layer.mlp) for layer in model.model.layers]

    @torch.no_grad()
    def nll(self, removed: Collection[int]) -> float:
        """Mean NLL without some blocks, nats per token."""
        for index, (layer, (attention, ffn)) in enumerate(
            zip(self._model.model.layers, self._kept, strict=True)
        ):
            layer.self_attn = _NoAttention() if 2 * index in removed else attention
            layer.mlp = _NoFFN() if 2 * index + 1 in removed else ffn
        logits = self._model(self._tokens, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), self._tokens[:, 1:].reshape(-1)
        )
        return float(loss)


_naive: list[NaiveModel] = []  # of the process that scores


def _start(threads: int, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    _naive[:] = [NaiveModel(*arguments)]
    _naive[0].nll(())


def _score(removed: Collection[int]) -> Scored:
    began = time.perf_counter()
    nll = _naive[0].nll(removed)  # a number on the host, so CUDA has ended too
    return time.perf_counter() - began, nll


def main(settings: ScoringSettings) -> None:
    """Measure, check the scores, and write all records."""
    llm = open_model(settings)
    text = CorpusConfig(windows=settings.windows, window_tokens=settings.window_tokens)
    corpus = load_corpus(text, llm)
    folder = os.fspath(locate(settings.model).folder)
    arguments = (torch.get_num_threads(), folder, llm.dtype, str(llm.device), corpus.tokens)
    # In a process of its own, because loading a model with this project also changes how
    # freed memory is kept, which would speed up the naive loop too.
    with ProcessPoolExecutor(1, get_context("spawn"), _start, arguments) as process:

        def naive(plan: Plan) -> Scored:
            return process.submit(_score, sorted(plan.removed)).result()

        measure_plans(settings, PlanScorer(llm, corpus), naive)
        measure_gsi(settings, lambda: PlanScorer(llm, corpus), naive)


def episode_plans(memory: MemoryModel, count: int) -> list[Plan]:
    """Distinct plans of episodes that remove random blocks until the request fits, shuffled."""
    drawn, plans = random.Random(0), dict[Plan, None]()
    while len(plans) < count:
        request = Request.at_fraction(memory, 1, 32, drawn.uniform(0.55, 0.95))
        plan = Plan()
        while memory.peak_bytes(plan, request) > request.budget_bytes:
            plan = plan.without(drawn.choice([*set(range(memory.facts.num_blocks)) - plan.removed]))
            plans[plan] = None
    return drawn.sample([*plans][:count], count)


def measure_plans(
    settings: ScoringSettings, scorer: PlanScorer, naive: Callable[[Plan], Scored]
) -> None:
    """Time `nll_many` on plans of episodes, and compare the scores with the naive loop's."""
    plans = episode_plans(MemoryModel(scorer.llm), settings.plans)
    began = time.perf_counter()
    nll = scorer.nll_many(plans)
    seconds = time.perf_counter() - began
    naive_s, naive_nll = zip(*map(naive, plans), strict=True)
    apart = max(abs(a - b) for a, b in zip(naive_nll, nll, strict=True))
    if apart > _TOLERANCE:
        raise SystemExit(f"Scores differ by {apart} from the naive loop's; nothing recorded.")
    blocks = sum(scorer.llm.num_blocks - len(plan.removed) for plan in plans)
    what, times = "all masks of episodes, times as fast", sum(naive_s) / seconds
    write_record(
        "nll_many",
        settings,
        [target(what, times, at_least=1.8, against=f"{_EACH} mask")],
        device=str(scorer.llm.device),
        seconds=seconds,
        share_of_blocks_saved=1 - scorer.block_forwards / blocks,
        largest_nll_difference_to_naive=apart,
    )


def measure_gsi(
    settings: ScoringSettings, new_scorer: Callable[[], PlanScorer], naive: Callable[[Plan], Scored]
) -> None:
    """Time exact and lazy GSI, and check that the exact order is the naive loop's."""
    scorer, order, naive_s = new_scorer(), list[int](), 0.0
    for _ in range(settings.removals):
        candidates = [n for n in range(scorer.llm.num_blocks) if n not in order]
        scored = {block: naive(Plan.removing(*order, block)) for block in candidates}
        naive_s += sum(seconds for seconds, _ in scored.values())
        order.append(min(scored, key=lambda block: scored[block][1]))

    def timed(method: str) -> tuple[float, GSIProfile]:
        scorer = new_scorer()
        _ = scorer.native_nll  # the naive loop does not measure the native model
        began = time.perf_counter()
        profile = gsi(scorer, method=method, stop=settings.removals, progress=False)
        return time.perf_counter() - began, profile

    exact_s, exact = timed("exact")
    if scorer.llm.device.type == "cpu" and order != list(exact.order_indices):
        raise SystemExit("Exact GSI gave another order than the naive loop; nothing was recorded.")
    runs = [timed("lazy") for _ in range(settings.repeats)]
    lazy = runs[0][1]
    near = scorer.nll(Plan.removing(*lazy.order_indices)) / exact.nll_after[-1]
    times, each = [naive_s / seconds for seconds, _ in runs], f"{_EACH} candidate"
    write_record(
        "gsi",
        settings,
        [
            target("exact GSI, times as fast", naive_s / exact_s, at_least=2.2, against=each),
            target("lazy GSI, times as fast", *times, at_least=9.0, against=each),
            target("lazy GSI, final NLL over exact's", near, at_most=1.01),
        ],
        device=str(scorer.llm.device),
        naive_s=naive_s,
        order=exact.order,
        candidates={"exact": sum(exact.candidates), "lazy": sum(lazy.candidates)},
    )


if __name__ == "__main__":
    run_with_settings(ScoringSettings, main)
