"""Losses on long documents: by position, and of reference answers to questions about them."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experiments.config.common import TextConfig
from experiments.config.long_context import AnswersConfig
from experiments.contexts import load_text
from rap_env.artifacts import digest
from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring.likelihoods import ContinuationScorer, TokenRequest
from rap_env.scoring.local_data import read_rows
from rap_env.scoring.nll import HEAD_TOKENS, predictions, token_nll

Losses = npt.NDArray[np.float64]
"""Mean NLL of each document and bucket, nats per token, (documents, buckets)."""

_TASK_FIELDS = ("context", "question", "answers")


class PositionLoss:
    """The loss by position on documents of one length.

    Attributes:
        length: Tokens of a document.
        buckets: First and last position (exclusive) of each bucket.
        identity: What the losses depend on besides model and plan.
    """

    def __init__(self, llm: ElasticLLM, text: TextConfig, bucket_tokens: int) -> None:
        self._partial = PartialForward(llm, widen=True)
        self._llm = llm
        self.length = text.window_tokens
        self.tokens = _documents(llm, text)
        edges = [*range(0, self.length, bucket_tokens), self.length]
        self.buckets = [[low, high] for low, high in itertools.pairwise(edges)]
        text_hash = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        self.identity = {"tokens": text_hash, "buckets": self.buckets}

    @torch.inference_mode()
    def measure(self, plan: Plan) -> Losses:
        """The losses under a plan; the prediction of a token counts at the token's position."""
        by_document = []
        for ids in self.tokens.to(self._llm.device):
            with self._llm.masked(plan):
                rows, targets = predictions(self._partial.hidden(ids[None]), ids[None])
                losses = torch.cat(
                    [
                        token_nll(self._partial.logits(part), wanted)
                        for part, wanted in zip(
                            torch.split(rows, HEAD_TOKENS),
                            torch.split(targets, HEAD_TOKENS),
                            strict=True,
                        )
                    ]
                )
            by_document.append(
                [float(losses[max(0, a - 1) : b - 1].mean()) for a, b in self.buckets]
            )
        return np.array(by_document)


class AnswerLoss:
    """The loss of reference answers, given documents that are cut to one length.

    A document that is too long loses its middle, as in LongBench (Bai et al. 2024). A model of this
    size cannot be judged by the answers that it generates, but by how likely it finds right ones.

    Attributes: see `PositionLoss`.
    """

    def __init__(self, llm: ElasticLLM, settings: AnswersConfig, length: int) -> None:
        self._llm = llm
        self.length = length
        self.buckets = [[0, length]]
        path = Path(str(settings.data_root)).expanduser() / settings.task / "test.jsonl"
        rows = read_rows(path, _TASK_FIELDS)
        if len(rows) < settings.questions:
            raise CorpusError(
                f"{path} has {len(rows)} questions, but {settings.questions} are needed; set "
                "long_context.answers.questions."
            )
        requests = [_answer_request(llm, row, length) for row in rows[: settings.questions]]
        self._answer_tokens = np.array([len(answer) for _, answer in requests])
        self._scorer = ContinuationScorer(llm, requests, llm.facts.max_positions)
        self.identity = {"requests": digest(requests)}

    def measure(self, plan: Plan) -> Losses:
        """The losses under a plan, nats per token of an answer."""
        with self._llm.masked(plan):
            sums = self._scorer.run()[:, 0]
        losses: Losses = (-sums / self._answer_tokens)[:, None]
        return losses


def _documents(llm: ElasticLLM, text: TextConfig) -> torch.Tensor:
    """Token ids of the documents, (documents, tokens)."""
    if text.source == "self":
        return load_text(text, "report", llm).tokens
    documents: list[list[int]] = []
    rows = read_rows(Path(text.source).expanduser(), (text.field,))
    for document in dict.fromkeys(str(row[text.field]) for row in rows):
        ids = _encode(llm, document)
        if len(ids) >= text.window_tokens:
            documents.append(ids[: text.window_tokens])
    if len(documents) < text.windows:
        raise CorpusError(
            f"{text.source} has {len(documents)} documents of at least {text.window_tokens} "
            f"tokens, but {text.windows} are needed. Set fewer windows or fewer window_tokens."
        )
    chosen = np.random.default_rng(text.seed).permutation(len(documents))[: text.windows]
    return torch.tensor([documents[number] for number in sorted(chosen)])


def _answer_request(llm: ElasticLLM, row: dict[str, Any], length: int) -> TokenRequest:
    """The tokens before the answer and those of the answer, together at most `length`."""
    head = _encode(llm, "Transcript of a meeting:\n", special=True)
    document = _encode(llm, str(row["context"]))
    question = _encode(llm, f"\n\nQuestion: {row['question']}\nAnswer:")
    answer = _encode(llm, f" {row['answers'][0]}")
    room = length - len(head) - len(question) - len(answer)
    if room < 0:
        raise CorpusError(
            f"Question and answer {row['question']!r} have more than {length} tokens; set longer "
            "long_context.answers.lengths."
        )
    if len(document) > room:
        document = [*document[: room - room // 2], *document[len(document) - room // 2 :]]
    return [*head, *document, *question], answer


def _encode(llm: ElasticLLM, text: str, special: bool = False) -> list[int]:
    if llm.tokenizer is None:
        raise CorpusError(f"{llm.name} has no tokenizer to read documents with.")
    return list(llm.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
