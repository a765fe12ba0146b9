"""Log-likelihoods of continuations: the decoder over all tokens, the head only where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.scoring.encoding import TokenRequest

BATCH_ROWS = 64
BATCH_TOKENS = 4096
HEAD_TOKENS = 256  # logits of so many positions exist at once


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass and what to read from them.

    Shapes: B rows, T tokens, P positions whose logits are needed, M tokens to look up.

    Attributes:
        tokens: Right-padded token ids, (B, T). No attention mask is needed: the padding
            comes after all that is read.
        rows: Row of each position, (P,).
        columns: Token index of each position, (P,).
        position: For each token to look up, its position's number, ascending, (M,).
        target: The token ids to look up, (M,).
        request: The request that each belongs to, (M,).
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    request: torch.Tensor


class ContinuationScorer:
    """Scores a fixed list of (context, continuation) pairs under whatever mask is applied.

    Gives what lm-eval's `HFLM` gives for the same token ids: sums of log-probabilities in
    float32 and whether every token was the most likely one. Contexts that are too long lose
    tokens on the left, and equal inputs are run once, as there; the head runs on the
    positions of continuations only.

    Args:
        llm: The live model.
        requests: Token ids of contexts and continuations.
        max_length: Most tokens of one input.
    """

    def __init__(self, llm: ElasticLLM, requests: Sequence[TokenRequest], max_length: int) -> None:
        self._llm = llm
        self._partial = PartialForward(llm)
        self._decoder = llm.adapter.decoder(llm.model)
        self.num_requests = len(requests)
        inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(max_length + 1) :][:-1]
            inputs.setdefault(tuple(tokens), []).append(number)
        # Longest first: a batch that does not fit the memory fails at the start.
        ordered = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
        targets = [continuation for _, continuation in requests]
        self._batches = [
            _make_batch(chunk, [inputs[tokens] for tokens in chunk], targets)
            for chunk in _chunks(ordered)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens that one call runs, padding included."""
        return sum(batch.tokens.numel() for batch in self._batches)

    @torch.inference_mode()
    def run(self, *, progress: str | None = None) -> npt.NDArray[np.float64]:
        """Score all requests.

        Args:
            progress: Text of a progress bar, or None for none.

        Returns:
            Shape (requests, 2): log-likelihood in nats, and 1.0 where greedy decoding would have
            given the continuation.
        """
        device = self._llm.device
        sums = torch.zeros(self.num_requests, dtype=torch.float64, device=device)
        wrong = torch.zeros(self.num_requests, dtype=torch.float64, device=device)
        bar = tqdm(self._batches, desc=progress, leave=False, disable=None if progress else True)
        for batch in bar:
            hidden = self._decoder(batch.tokens.to(device), use_cache=False).last_hidden_state
            wanted = hidden[batch.rows.to(device), batch.columns.to(device)]
            request = batch.request.to(device)
            logs, greedy = self._look_up(wanted, batch)
            sums.index_add_(0, request, logs.double())
            wrong.index_add_(0, request, (~greedy).double())
        return torch.stack([sums, (wrong == 0).double()], dim=1).cpu().numpy()

    def _look_up(self, hidden: torch.Tensor, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target and whether it is the argmax, both (M,)."""
        logs, greedy = [], []
        for start in range(0, len(hidden), HEAD_TOKENS):
            logits = self._partial.logits(hidden[start : start + HEAD_TOKENS])
            scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            first, last = torch.searchsorted(
                batch.position, torch.tensor([start, start + HEAD_TOKENS])
            ).tolist()
            position = batch.position[first:last].to(hidden.device) - start
            target = batch.target[first:last].to(hidden.device)
            logs.append(scores[position, target])
            greedy.append(scores.argmax(dim=-1)[position] == target)
        return torch.cat(logs), torch.cat(greedy)


def _chunks(ordered: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Split inputs, longest first, into batches of limited rows and tokens."""
    start = 0
    while start < len(ordered):
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // len(ordered[start])))
        yield ordered[start : start + rows]
        start += rows


def _make_batch(
    inputs: Sequence[tuple[int, ...]], owners: Sequence[list[int]], targets: Sequence[list[int]]
) -> _Batch:
    tokens = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    wanted: list[tuple[int, int, int]] = []
    for row, (ids, requests) in enumerate(zip(inputs, owners, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        longest = max(len(targets[request]) for request in requests)
        end = len(rows) + longest
        rows += [row] * longest
        columns += range(len(ids) - longest, len(ids))
        for request in requests:
            begin = end - len(targets[request])
            wanted += [(begin + i, token, request) for i, token in enumerate(targets[request])]
    position, target, owner = torch.tensor(sorted(wanted)).unbind(dim=1)
    return _Batch(
        tokens=tokens,
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        position=position.contiguous(),
        target=target,
        request=owner,
    )
