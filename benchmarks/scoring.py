"""Scoring against full forward passes of a plain model: ``python -m benchmarks.scoring``.

Record ``nll_many``: many masks are scored at once. They are those that a MaskablePPO agent scored
during a training on the model, in two ways: with a reward at each step, all masks of its episodes;
with a reward at the end, only the last mask of each episode, which share far fewer blocks. Record
``gsi``: exact and lazy GSI against the naive loop over all candidates.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from agents.algorithms import AgentConfig
from agents.training import train
from benchmarks.measuring import ModelSettings, open_model, spread
from benchmarks.record import Target, write_record
from experiments.study.console import run_with_settings
from rap_env.context.live import LiveContext
from rap_env.envs.prune import RAPPruneVectorEnv
from rap_env.importance.gsi_search import gsi
from rap_env.importance.profiles import GSIProfile
from rap_env.models.files.sources import locate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import METRIC, MaskScorer
from rap_env.scoring.store import ScoreStore

_EACH_MASK = "one full forward of a plain model for each mask"
_EACH_CANDIDATE = "one full forward of a plain model for each candidate"
_NAMES = {
    "dense": "all masks of episodes, times as fast",
    "terminal": "last masks of episodes, times as fast",
}
_TOLERANCE = 1e-3  # a plain model's loss sums in another order

NaiveLoop = Callable[[Plan], tuple[float, float]]
"""The naive loop in a process of its own: returns seconds and NLL of a mask."""


@dataclass
class ScoringSettings(ModelSettings):
    """Settings of this benchmark."""

    windows: int = 8
    window_tokens: int = 128
    masks: int = 256
    """Number of masks to score."""
    train_steps: int = 6144
    """Steps of the training that gives the last masks of episodes."""
    removals: int = 24
    """Blocks that GSI removes."""


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoFFN(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class NaiveModel:
    """A plain Llama-like model and the text that masks are scored on by a full forward pass.

    Removed blocks return zeros, the pass computes all logits, and the loss is torch's own over all
    of them at once in float32, as in the code of SLEB, ShortGPT and BlockPruner.

    Args:
        tokens: Token ids, shape (windows, T), as nested lists.
    """

    def __init__(self, folder: str, dtype: str, device: str, tokens: list[list[int]]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = model.eval().to(device)
        self._tokens = torch.tensor(tokens, device=device)
        self._parts = [
            part for layer in self._model.model.layers for part in (layer.self_attn, layer.mlp)
        ]

    @torch.no_grad()
    def nll(self, removed: Collection[int]) -> float:
        """Mean NLL without some blocks, nats per token."""
        for index, layer in enumerate(self._model.model.layers):
            attention, ffn = 2 * index, 2 * index + 1
            layer.self_attn = _NoAttention() if attention in removed else self._parts[attention]
            layer.mlp = _NoFFN() if ffn in removed else self._parts[ffn]
        logits = self._model(self._tokens, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), self._tokens[:, 1:].reshape(-1)
        )
        return float(loss)


def serve_naive_scores(pipe: Connection, threads: int, *model_arguments: Any) -> None:
    """Answer each list of removed blocks with (seconds, NLL), until None is received.

    This runs in a process of its own, because loading a model with this project also changes how
    freed memory is kept, which would speed up the naive loop too.

    Args:
        pipe: Connection for the lists and the answers.
        threads: Threads of torch.
        model_arguments: As for `NaiveModel`.
    """
    torch.set_num_threads(threads)
    model = NaiveModel(*model_arguments)
    model.nll(())
    pipe.send("ready")
    while (removed := pipe.recv()) is not None:
        began = time.perf_counter()
        nll = model.nll(removed)  # a number on the host, so CUDA has ended too
        pipe.send((time.perf_counter() - began, nll))


@dataclass(frozen=True)
class ScoringSetup:
    """A model and a text."""

    llm: ElasticLLM
    corpus: Corpus
    settings: ScoringSettings

    @classmethod
    def open(cls, settings: ScoringSettings) -> ScoringSetup:
        """Load the model and the text, and set torch's threads."""
        llm = open_model(settings)
        text = CorpusConfig(windows=settings.windows, window_tokens=settings.window_tokens)
        return cls(llm, load_corpus(text, llm), settings)

    @contextlib.contextmanager
    def naive_loop(self) -> Iterator[NaiveLoop]:
        """A process with a plain model of the same weights, dtype, text and threads.

        Its C library returns freed memory; this project's keeps it.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        model = (
            os.fspath(locate(self.settings.model).folder),
            str(self.llm.dtype).removeprefix("torch."),
            str(self.llm.device),
            self.corpus.tokens.tolist(),
        )
        arguments = (theirs, torch.get_num_threads(), *model)
        process = context.Process(target=serve_naive_scores, args=arguments, daemon=True)

        def score(mask: Plan) -> tuple[float, float]:
            ours.send(sorted(mask.removed))
            answer: tuple[float, float] = ours.recv()
            return answer

        process.start()
        try:
            theirs.close()
            ours.recv()
            yield score
        finally:
            with contextlib.suppress(OSError):
                ours.send(None)
            process.join(timeout=10)
            process.kill()


def main(settings: ScoringSettings) -> None:
    """Measure, check the scores, and write both records."""
    setup = ScoringSetup.open(settings)
    for name, measure in (("nll_many", measure_masks), ("gsi", measure_gsi)):
        targets, measured = measure(setup)
        write_record(
            name,
            device=str(setup.llm.device),
            settings=settings,
            targets=targets,
            measured=measured,
            notes=["A ratio is total naive seconds over total seconds."],
        )


def measure_masks(setup: ScoringSetup) -> tuple[list[Target], dict[str, Any]]:
    """Time `nll_many` on masks of trainings, and compare the scores with the naive loop's."""
    settings, targets, measured = setup.settings, [], {}
    for timing, steps in (("dense", settings.masks), ("terminal", settings.train_steps)):
        masks = rollout_masks(setup, timing, steps)[: settings.masks]
        scorer = MaskScorer(setup.llm, setup.corpus)
        began = time.perf_counter()
        nll = scorer.nll_many(masks)
        seconds = time.perf_counter() - began
        with setup.naive_loop() as loop:
            answers = [loop(mask) for mask in masks]
        naive_s = sum(mask_s for mask_s, _ in answers)
        apart = max(abs(naive - own) for (_, naive), own in zip(answers, nll, strict=True))
        if apart > _TOLERANCE:
            raise SystemExit(f"Scores differ by {apart} from the naive loop's; nothing recorded.")
        blocks = sum(setup.llm.num_blocks - len(mask.removed) for mask in masks)
        targets.append(Target(_NAMES[timing], 1.8, None, naive_s / seconds, _EACH_MASK))
        measured[timing] = {
            "masks": len(masks),
            "blocks_removed": spread([len(mask.removed) for mask in masks]),
            "seconds": seconds,
            "naive_s": naive_s,
            "share_of_blocks_saved": 1 - scorer.block_forwards / blocks,
            "largest_nll_difference_to_naive": apart,
        }
    return targets, measured


def rollout_masks(setup: ScoringSetup, timing: str, steps: int) -> list[Plan]:
    """Masks that a training on the model scored, shuffled with a fixed seed.

    Args:
        setup: The model. The training's own text is short, since only its masks are used.
        timing: Timing of the reward (see `rap_env.reward`).
        steps: Steps of the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = ScoreStore(Path(folder) / "scores.sqlite")
        text = load_corpus(
            CorpusConfig(windows=1, window_tokens=setup.settings.window_tokens), setup.llm
        )
        context = LiveContext(setup.llm, text, store, importance="none", progress=False)
        train(
            AgentConfig(name="maskable_ppo", total_timesteps=steps),
            lambda num_envs: RAPPruneVectorEnv(
                num_envs=num_envs,
                context=context,
                reward={"name": "perplexity", "timing": timing},
                autoreset_mode="SameStep",
            ),
            Path(folder) / "run",
        )
        rows = store.rows(context.scorer.context, METRIC)
        masks = [plan for plan, _ in rows if plan.is_mask and plan]
        masks.sort(key=lambda mask: sorted(mask.removed))
        store.close()
    return [masks[place] for place in np.random.default_rng(0).permutation(len(masks))]


def measure_gsi(setup: ScoringSetup) -> tuple[list[Target], dict[str, Any]]:
    """Time exact and lazy GSI, and check that the exact order is the naive loop's."""
    naive_order, naive_s = _naive_gsi(setup)
    exact_s, exact = _timed_gsi(setup, "exact")
    if setup.llm.device.type == "cpu" and naive_order != list(exact.order_indices):
        raise SystemExit("Exact GSI gave another order than the naive loop; nothing was recorded.")
    runs = [_timed_gsi(setup, "lazy") for _ in range(setup.settings.repeats)]
    lazy_s, lazy = [seconds for seconds, _ in runs], runs[0][1]
    lazy_nll = MaskScorer(setup.llm, setup.corpus).nll(Plan.removing(*lazy.order_indices))
    near = lazy_nll / exact.nll_after[-1]
    times = spread([naive_s / seconds for seconds in lazy_s])
    targets = [
        Target("exact GSI, times as fast", 2.2, None, naive_s / exact_s, _EACH_CANDIDATE),
        Target.of("lazy GSI, times as fast", times, at_least=9.0, against=_EACH_CANDIDATE),
        Target("lazy GSI, final NLL over exact's", None, 1.01, near),
    ]
    measured = {
        "naive_s": naive_s,
        "order": list(exact.order),
        "exact": {"seconds": exact_s, "candidates": sum(exact.candidates)},
        "lazy": {
            "seconds": spread(lazy_s),
            "candidates": sum(lazy.candidates),
            "blocks_removed_as_by_exact": len({*lazy.order_indices} & {*exact.order_indices}),
            "final_nll": lazy_nll,
        },
    }
    return targets, measured


def _naive_gsi(setup: ScoringSetup) -> tuple[list[int], float]:
    """Removed blocks in order, and seconds of all candidates."""
    order: list[int] = []
    total_s = 0.0
    with setup.naive_loop() as loop:
        for _ in range(setup.settings.removals):
            scores = {}
            for block in range(setup.llm.num_blocks):
                if block not in order:
                    seconds, scores[block] = loop(Plan.removing(*order, block))
                    total_s += seconds
            order.append(min(scores, key=lambda index: scores[index]))
    return order, total_s


def _timed_gsi(setup: ScoringSetup, method: Literal["exact", "lazy"]) -> tuple[float, GSIProfile]:
    scorer = MaskScorer(setup.llm, setup.corpus)
    _ = scorer.dense_nll  # the naive loop does not measure the dense model
    began = time.perf_counter()
    profile = gsi(scorer, method=method, stop=setup.settings.removals, progress=False)
    return time.perf_counter() - began, profile


if __name__ == "__main__":
    run_with_settings(ScoringSettings, main)
