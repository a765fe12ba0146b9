"""How good what was generated is: judged by the dense model, after all serving is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from experiments.comparison.records import append_record, read_records
from experiments.replay.load import Asked, Load, is_right
from rap_env.blocks import BlockMask
from rap_env.errors import NonFiniteScoreError
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.live_batch import LiveBatch
from rap_env.llm.partial import PartialForward
from rap_env.scoring.loss import token_nll
from rap_env.scoring.scorer import MaskScorer

_ROWS = 8


@dataclass(frozen=True)
class Reference:
    """What the dense model itself goes on with, greedily, on one request.

    Attributes:
        token_ids: Its tokens, as many as were asked for.
        nll: What it loses on them, nats per token.
    """

    token_ids: tuple[int, ...]
    nll: float


@dataclass(frozen=True)
class Quality:
    """What one served request is worth.

    Attributes:
        nll: What the dense model loses on its tokens, nats per token.
        reference_nll: The same on the dense model's own greedy continuation.
        same: Tokens that are the same as there, in the same place.
        right: Whether it begins with the known answer; None where none is known.
    """

    nll: float
    reference_nll: float
    same: int
    right: bool | None

    @property
    def loss(self) -> float:
        """Nats per token above the dense model's own continuation."""
        return self.nll - self.reference_nll


class QualityJudge:
    """Judges generated tokens.

    Args:
        llm: The live model; its mask is put back after each call.
        load: The requests.
        path: Where the dense model's own continuations are kept, JSON lines.
        scorer: Measures masks on held-out text; None leaves that out.
        progress: Whether to draw progress bars.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        load: Load,
        path: Path,
        scorer: MaskScorer | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self._llm = llm
        self._load = load
        self._path = path
        self._scorer = scorer
        self._progress = progress

    @cached_property
    def references(self) -> dict[int, Reference]:
        """The dense model's continuation of every request, by its number; made once and kept."""
        found = {
            int(record["number"]): Reference(tuple(record["token_ids"]), float(record["nll"]))
            for record in read_records(self._path)
        }
        left = [asked for asked in self._load.requests if asked.number not in found]
        left.sort(key=lambda asked: (asked.new_tokens, len(asked.prompt_ids)))
        bar = tqdm(total=len(left), desc="dense continuations", unit="request", leave=False,
                   disable=None if self._progress else True)  # fmt: skip
        with bar:
            for start in range(0, len(left), _ROWS):
                group = left[start : start + _ROWS]
                for asked, reference in zip(group, self._continue(group), strict=True):
                    found[asked.number] = reference
                    record = {"number": asked.number, "token_ids": list(reference.token_ids),
                              "nll": round(reference.nll, 6)}  # fmt: skip
                    append_record(self._path, record, durable=False)
                bar.update(len(group))
        return found

    def judge(self, asked: Asked, token_ids: Sequence[int]) -> Quality:
        """The quality of what was generated for a request, at least a token.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        reference = self.references[asked.number]
        same = sum(a == b for a, b in zip(token_ids, reference.token_ids, strict=False))
        equal = same == len(token_ids) == len(reference.token_ids)
        nll = reference.nll if equal else self._nll(asked.prompt_ids, token_ids)
        right = None
        if asked.answer is not None:
            text = self._llm.tokenizer.decode(list(token_ids), skip_special_tokens=True)
            right = is_right(asked.answer, text)
        return Quality(nll, reference.nll, same, right)

    def mask_loss(self, tokens: Mapping[BlockMask, int]) -> float | None:
        """Loss of masks on held-out text, mean over the tokens that each generated; None if none.

        Args:
            tokens: Tokens that were generated under each mask.
        """
        if self._scorer is None or not tokens:
            return None
        masks = list(tokens)
        losses = np.array(self._scorer.nll_many(masks)) - self._scorer.dense_nll
        return float(np.average(losses, weights=[tokens[mask] for mask in masks]))

    @torch.inference_mode()
    def _nll(self, prompt: Sequence[int], generated: Sequence[int]) -> float:
        """What the dense model loses on generated tokens after their prompt, nats per token."""
        ids = torch.tensor([[*prompt, *generated]], device=self._llm.device)
        with self._llm.masked(BlockMask()):
            states = self._llm.hidden(ids)[0, len(prompt) - 1 : -1]
            logits = PartialForward(self._llm).logits(states)
        return self._finite(float(token_nll(logits, ids[0, len(prompt) :]).double().mean()))

    def _continue(self, group: Sequence[Asked]) -> list[Reference]:
        """Greedy continuations of a few requests side by side."""
        with self._llm.masked(BlockMask()):
            batch = LiveBatch(self._llm)
            running = list(range(len(group)))
            tokens: list[list[int]] = [[] for _ in group]
            losses: list[list[float]] = [[] for _ in group]
            logits = batch.prefill([asked.prompt_ids for asked in group])
            while running:
                best = logits.log_softmax(dim=-1).max(dim=-1)
                for place, row in enumerate(running):
                    tokens[row].append(int(best.indices[place]))
                    losses[row].append(-float(best.values[place]))
                left = [p for p, row in enumerate(running)
                        if len(tokens[row]) < group[row].new_tokens]  # fmt: skip
                if len(left) < len(running):
                    batch.keep(left)
                    running = [running[place] for place in left]
                if running:
                    logits = batch.extend([tokens[row][-1] for row in running])
            batch.close()
        return [
            Reference(tuple(ids), self._finite(float(np.mean(nll))))
            for ids, nll in zip(tokens, losses, strict=True)
        ]

    def _finite(self, nll: float) -> float:
        if not np.isfinite(nll):
            raise NonFiniteScoreError(
                f"{self._llm.name} gave a non-finite NLL on generated text; check the weights, or "
                "load the model with model.dtype=float32."
            )
        return nll
