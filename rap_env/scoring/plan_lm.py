"""A model under a plan as a model of lm-eval, which decides on token ids; passes run here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from rap_env.errors import CorpusError, NonFiniteScoreError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring.lm_eval_tasks import SCORABLE_OUTPUTS, quiet

TokenRequest = tuple[list[int], list[int]]
"""Token ids of a context and of the continuation whose likelihood is measured."""

BATCH_ROWS = 64
BATCH_TOKENS = 4096
HEAD_TOKENS = 256  # positions whose logits are in memory at a time


class PlanLM(HFLM):  # type: ignore[misc]
    """A live model under a plan, for ``lm_eval.simple_evaluate(model=PlanLM(llm, plan), ...)``.

    It is an `lm_eval.api.model.LM` that computes likelihoods, those of whole texts included,
    and generates no text. Token ids are those of lm-eval's `HFLM`, so the rules for empty
    contexts, trailing spaces and start tokens are lm-eval's. Results are those of `HFLM` too:
    sums of log-probabilities in float32, and whether every token was the most likely one.
    Contexts that are too long are truncated on the left, and equal inputs run once. Unlike in
    `HFLM`, the head runs on the positions of continuations only, and lowered caches are those
    of `rap_env.levels`: a likelihood is what decoding token by token would give.

    Args:
        llm: The live model; its plan is restored after each call, its tokenizer is not
            changed.
        plan: The plan.

    Raises:
        CorpusError: The model has no tokenizer.
        UnknownNameError: The plan names items or levels that the model does not have.
    """

    def __init__(self, llm: ElasticLLM, plan: Plan = Plan()) -> None:
        if llm.tokenizer is None:
            raise CorpusError(f"{llm.name} has no tokenizer to read tasks with.")
        MemoryModel(llm).check_plan(plan)
        self.llm, self.plan = llm, plan
        self._partial = PartialForward(llm, widen=True)
        # Tying weights again would replace a quantised head.
        keep = patch.object(llm.model, "tie_weights", lambda *_args, **_kwargs: None)
        with llm.exclusive(), quiet(), keep:
            super().__init__(
                pretrained=llm.model,
                backend="causal",
                # A copy, because lm-eval sets a padding token if there is none.
                tokenizer=copy.deepcopy(llm.tokenizer),
                batch_size=BATCH_ROWS,
            )

    def encode(self, requests: Sequence[Any]) -> list[TokenRequest]:
        """Token ids of lm-eval's requests."""
        reader: Any = copy.copy(self)
        reader._loglikelihood_tokens = lambda encoded, **_: encoded  # in place of likelihoods
        encoded = reader.loglikelihood(list(requests), disable_tqdm=True)
        return [(list(context), list(continuation)) for _, context, continuation in encoded]

    def batches(
        self, requests: Sequence[TokenRequest], *, share_prefixes: bool = False
    ) -> list[Batch]:
        """Forward passes that answer requests under any plan, see `make_batches`."""
        return make_batches(requests, self.max_length, share_prefixes=share_prefixes)

    def run(self, batches: Sequence[Batch], plan: Plan) -> npt.NDArray[np.float64]:
        """Log-likelihoods under a plan, see `likelihoods`.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        with self.llm.applied(plan):
            outputs = likelihoods(self._partial, batches)
        if not np.isfinite(outputs).all():
            raise NonFiniteScoreError(
                f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite likelihood ({plan}); "
                "check the weights, or load the model with dtype='float32'."
            )
        return outputs

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        """Reject tasks that are scored by generated text."""
        hint = "Only likelihoods are computed under a plan; generate text with llm.generate."
        raise UnknownNameError("output of a task", "generate_until", SCORABLE_OUTPUTS, hint)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, target) for _, context, target in requests]
        outputs = self.run(self.batches(pairs), self.plan)
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in outputs]


class Batch(NamedTuple):
    """Inputs of one forward pass and the outputs to read from them.

    Shapes: B rows, T tokens, P positions whose logits are needed, M tokens to look up.

    Attributes:
        tokens: Right-padded token ids, (B, T). No attention mask is needed, because the
            padding follows all positions that are read.
        positions: Row and token index of each position, (2, P).
        lookups: For each token to look up, its position's number, ascending, the token's id,
            and the request that it belongs to, (3, M).
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lookups: torch.Tensor


def make_batches(
    requests: Sequence[TokenRequest], max_length: int, *, share_prefixes: bool = False
) -> list[Batch]:
    """Forward passes that answer requests, built once for all plans.

    Args:
        requests: Token ids of contexts and continuations.
        max_length: Most tokens of one input.
        share_prefixes: Whether an input that is the beginning of another one does not run:
            the model is causal, so its outputs are those of the other one up to rounding.

    Raises:
        CorpusError: A context or a continuation is empty, or a continuation is too long.
    """
    for context, continuation in requests:
        if not context or not continuation or len(continuation) > max_length:
            raise CorpusError(
                f"A request has {len(context)} context and {len(continuation)} continuation "
                "tokens; each must have at least 1, and the continuation at most "
                f"{max_length} (the model's positions)."
            )
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
    return [
        _make_batch(chunk, [inputs[tokens] for tokens in chunk], targets)
        for chunk in _chunks(ordered)
    ]


@torch.inference_mode()
def likelihoods(partial: PartialForward, batches: Sequence[Batch]) -> npt.NDArray[np.float64]:
    """Likelihoods of requests under the plan that is applied.

    Returns:
        Shape (requests, 2): log-likelihood in nats, and 1.0 if greedy decoding would give the
        continuation.
    """
    requests = 1 + max(int(batch.lookups[2].max()) for batch in batches)
    # Log-likelihood, tokens not greedy.
    totals = torch.zeros(requests, 2, dtype=torch.float64)
    for batch in batches:
        hidden = partial.hidden(batch.tokens)
        rows, columns = batch.positions.to(hidden.device)
        states = hidden[rows, columns]
        totals.index_add_(0, batch.lookups[2], _look_up(partial, states, batch.lookups).cpu())
    totals[:, 1] = (totals[:, 1] == 0).double()
    return totals.numpy()


def _look_up(partial: PartialForward, hidden: torch.Tensor, lookups: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token of `lookups` and 1 if it is not the argmax, (M, 2)."""
    values = []
    for start in range(0, len(hidden), HEAD_TOKENS):
        logits = partial.logits(hidden[start : start + HEAD_TOKENS])
        scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        within = (lookups[0] >= start) & (lookups[0] < start + HEAD_TOKENS)
        position, target, _ = lookups[:, within].to(hidden.device)
        position = position - start
        missed = scores.argmax(dim=-1)[position] != target
        values.append(torch.stack([scores[position, target], missed], dim=1).double())
    return torch.cat(values)


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
) -> Batch:
    tokens = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True)
    needed = sorted(
        (row, end - len(targets[request]) + place, token, request)
        for row, requests in enumerate(owners)
        for request, end in requests
        for place, token in enumerate(targets[request])
    )
    rows, columns, looked_up, requests = torch.tensor(needed).T
    positions, numbers = torch.unique(
        torch.stack([rows, columns]), dim=1, return_inverse=True
    )  # each position runs once
    return Batch(tokens, positions, torch.stack([numbers, looked_up, requests]))
