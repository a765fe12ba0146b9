"""Quality of generated text, measured with the dense model after a system has finished."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.replay.workload import ReplayRequest, Workload, is_correct
from experiments.study.json_records import append_record, read_records
from rap_env.errors import NonFiniteScoreError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.scoring.plan_runner import token_nll


class Reference(NamedTuple):
    """The dense model's own greedy continuation of a request, and its NLL, nats per token."""

    token_ids: tuple[int, ...]
    nll: float


class OutputQuality(NamedTuple):
    """Quality of the text generated for one request.

    Attributes:
        delta_nll: NLL of its tokens under the dense model, above that of the dense model's own
            greedy continuation, nats per token.
        same: Number of tokens equal to that continuation at the same position.
        right: Whether it begins with the known answer; None without a known answer.
    """

    delta_nll: float
    same: int
    right: bool | None


class QualityEvaluator:
    """Measures the quality of generated tokens.

    Args:
        llm: The live model; each call restores its plan.
        workload: The requests.
        path: JSON-lines file of the dense model's own continuations.
        progress: Whether to draw progress bars.
    """

    def __init__(
        self, llm: ElasticLLM, workload: Workload, path: Path, *, progress: bool = False
    ) -> None:
        self._llm = llm
        self._workload = workload
        self._path = path
        self._progress = progress

    @cached_property
    def references(self) -> dict[int, Reference]:
        """The dense model's continuation of every request, by number; computed once and stored."""
        references = {
            int(record["number"]): Reference(tuple(record["token_ids"]), float(record["nll"]))
            for record in read_records(self._path)
        }
        left = [r for r in self._workload.requests if r.number not in references]
        for request in progress_bar(self._progress, left, desc="dense continuations", unit="text"):
            reference = references[request.number] = self._continue(request)
            record = {"number": request.number, "token_ids": list(reference.token_ids),
                      "nll": round(reference.nll, 6)}  # fmt: skip
            append_record(self._path, record, durable=False)
        return references

    def evaluate(self, request: ReplayRequest, token_ids: Sequence[int]) -> OutputQuality:
        """Measure what was generated for a request, at least one token.

        Raises:
            NonFiniteScoreError: The model returned NaN or infinity.
        """
        reference = self.references[request.number]
        same = sum(a == b for a, b in zip(token_ids, reference.token_ids, strict=False))
        equal = same == len(token_ids) == len(reference.token_ids)
        nll = reference.nll if equal else self._nll(request.prompt_ids, token_ids)
        right = None
        if request.answer is not None:
            text = self._llm.tokenizer.decode(list(token_ids), skip_special_tokens=True)
            right = is_correct(request.answer, text)
        return OutputQuality(nll - reference.nll, same, right)

    @torch.inference_mode()
    def _nll(self, prompt: Sequence[int], generated: Sequence[int]) -> float:
        """NLL of generated tokens after their prompt under the dense model, nats per token."""
        ids = torch.tensor([[*prompt, *generated]], device=self._llm.device)
        with self._llm.masked(Plan()):
            states = self._llm.hidden(ids)[0, len(prompt) - 1 : -1]
            logits = PartialForward(self._llm).logits(states)
        return self._finite(float(token_nll(logits, ids[0, len(prompt) :]).double().mean()))

    def _continue(self, request: ReplayRequest) -> Reference:
        """The dense model's greedy continuation of a request."""
        tokens: list[int] = []
        nll: list[float] = []
        with self._llm.masked(Plan()):
            batch = LiveBatch(self._llm)
            logits = batch.prefill([request.prompt_ids])
            for _ in range(request.new_tokens):
                if tokens:
                    logits = batch.extend(tokens[-1:])
                best = logits[0].log_softmax(dim=-1).max(dim=-1)
                tokens.append(int(best.indices))
                nll.append(-float(best.values))
            batch.close()
        return Reference(tuple(tokens), self._finite(float(np.mean(nll))))

    def _finite(self, nll: float) -> float:
        if not np.isfinite(nll):
            raise NonFiniteScoreError(
                f"{self._llm.name} returned a non-finite NLL on generated text; check the weights, "
                "or load the model with model.dtype=float32."
            )
        return nll
