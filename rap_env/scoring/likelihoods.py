"""Log-likelihoods of lm-eval's requests: token ids by lm-eval, forward passes by this project."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward

TokenRequest = tuple[list[int], list[int]]
"""Token ids of a context and of the continuation whose likelihood is measured."""

BATCH_ROWS = 64
BATCH_TOKENS = 4096
HEAD_TOKENS = 256  # positions whose logits are in memory at a time


class RequestEncoder:
    """Converts a task's requests into token ids with lm-eval's own code.

    A subclass of lm-eval's `HFLM` wraps the live model but never runs it: it records the token
    ids of which `HFLM` would compute likelihoods. So the rules for empty contexts, trailing
    spaces and start tokens are lm-eval's. The tokenizer is not changed.

    Raises:
        CorpusError: It has no tokenizer.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        if llm.tokenizer is None:
            raise CorpusError(f"{llm.name} has no tokenizer to read tasks with.")
        self._lm = _recording_model(llm)
        self.max_length = int(self._lm.max_length)

    def encode(self, task: Any) -> list[TokenRequest]:
        """The token request of each of a task's instances."""
        self._lm.recorded = []
        self._lm.loglikelihood(task.instances, disable_tqdm=True)
        requests: list[TokenRequest] = self._lm.recorded
        for context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise CorpusError(
                    f"A request of the task {task.task_name!r} has {len(context)} context and "
                    f"{len(continuation)} continuation tokens; each must have at least 1, and the "
                    f"continuation at most {self.max_length} (the model's positions)."
                )
        return requests


def _recording_model(llm: ElasticLLM) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Recorder(HFLM):  # type: ignore[misc]
        recorded: list[TokenRequest]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            self.recorded.extend((list(context), list(target)) for _, context, target in requests)
            return [(0.0, False)] * len(requests)

    with llm.exclusive(), _untouched(llm.model):
        return Recorder(
            pretrained=llm.model,
            backend="causal",
            # A copy, because lm-eval sets a padding token if there is none.
            tokenizer=copy.deepcopy(llm.tokenizer),
            batch_size=64,
        )


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Keep `HFLM` from tying weights again, which would replace a quantised head."""
    model.tie_weights = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


class _Batch(NamedTuple):
    """Inputs of one forward pass and the outputs to read from them.

    Shapes: B rows, T tokens, P positions whose logits are needed, M tokens to look up.

    Attributes:
        tokens: Right-padded token ids, (B, T). No attention mask is needed, because the padding
            follows all positions that are read.
        rows: Row of each position, (P,).
        columns: Token index of each position, (P,).
        lookups: For each token to look up, its position's number, ascending, the token's id, and
            the request that it belongs to, (3, M).
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    lookups: torch.Tensor


class ContinuationScorer:
    """Scores a fixed list of (context, continuation) pairs under the mask that is applied.

    The results are those of lm-eval's `HFLM` for the same token ids: sums of log-probabilities in
    float32, and whether every token was the most likely one. As in `HFLM`, contexts that are too
    long are truncated on the left and equal inputs run once. Unlike `HFLM`, the head runs on the
    positions of continuations only. `max_length` is the most tokens of one input.

    With `share_prefixes`, an input that is the beginning of another one does not run: the model is
    causal, so its outputs are those of the other one up to rounding.

    Attributes:
        num_requests: Number of pairs.
        lengths: Tokens of each input that runs, the longest first.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        requests: Sequence[TokenRequest],
        max_length: int,
        *,
        share_prefixes: bool = False,
    ) -> None:
        self._llm = llm
        self._partial = PartialForward(llm, widen=True)
        self.num_requests = len(requests)
        # The requests of each input, with the number of tokens that they read of it.
        inputs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for number, (context, continuation) in enumerate(requests):
            tokens = tuple((context + continuation)[-(max_length + 1) :][:-1])
            inputs.setdefault(tokens, []).append((number, len(tokens)))
        if share_prefixes:
            inputs = _without_prefixes(inputs)
        # Longest first: a batch that does not fit the memory fails at the start.
        ordered = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
        targets = [continuation for _, continuation in requests]
        self._batches = [
            _make_batch(chunk, [inputs[tokens] for tokens in chunk], targets)
            for chunk in _chunks(ordered)
        ]
        self.lengths = [len(tokens) for tokens in ordered]

    @torch.inference_mode()
    def run(self) -> npt.NDArray[np.float64]:
        """Score all requests.

        Returns:
            Shape (requests, 2): log-likelihood in nats, and 1.0 if greedy decoding would give the
            continuation.
        """
        device = self._llm.device
        sums = torch.zeros(self.num_requests, dtype=torch.float64, device=device)
        wrong = torch.zeros(self.num_requests, dtype=torch.float64, device=device)
        for batch in self._batches:
            hidden = self._partial.hidden(batch.tokens.to(device))
            states = hidden[batch.rows.to(device), batch.columns.to(device)]
            logs, greedy = self._look_up(states, batch.lookups)
            request = batch.lookups[2].to(device)
            sums.index_add_(0, request, logs.double())
            wrong.index_add_(0, request, (~greedy).double())
        return torch.stack([sums, (wrong == 0).double()], dim=1).cpu().numpy()

    def _look_up(
        self, hidden: torch.Tensor, lookups: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token of `lookups` and whether it is the argmax, both (M,)."""
        logs, greedy = [], []
        for start in range(0, len(hidden), HEAD_TOKENS):
            logits = self._partial.logits(hidden[start : start + HEAD_TOKENS])
            scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            within = (lookups[0] >= start) & (lookups[0] < start + HEAD_TOKENS)
            position, target, _ = lookups[:, within].to(hidden.device)
            position = position - start
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


def _without_prefixes(
    inputs: dict[tuple[int, ...], list[tuple[int, int]]],
) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Inputs that are not the beginning of another one, with the requests of those that are."""
    kept: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    longer: tuple[int, ...] = ()
    for tokens in sorted(inputs, reverse=True):  # an input follows those that begin with it
        if longer[: len(tokens)] != tokens:
            longer = tokens
        kept.setdefault(longer, []).extend(inputs[tokens])
    return kept


def _make_batch(
    inputs: Sequence[tuple[int, ...]],
    owners: Sequence[list[tuple[int, int]]],
    targets: Sequence[list[int]],
) -> _Batch:
    tokens = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    lookups: list[tuple[int, int, int]] = []  # position, target, request
    for row, (ids, requests) in enumerate(zip(inputs, owners, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        needed = sorted({end - i for n, end in requests for i in range(1, len(targets[n]) + 1)})
        place = {column: len(rows) + number for number, column in enumerate(needed)}
        rows += [row] * len(needed)
        columns += needed
        for request, end in requests:
            first = end - len(targets[request])
            lookups += [
                (place[first + i], token, request) for i, token in enumerate(targets[request])
            ]
    in_order = torch.tensor(sorted(lookups)).T
    return _Batch(tokens, torch.tensor(rows), torch.tensor(columns), in_order)
