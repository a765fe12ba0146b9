"""Mean NLL of plans on a fixed text; what several share is computed once."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from rap_env.errors import CorpusError, NonFiniteScoreError
from rap_env.memory import MemoryModel
from rap_env.models.caches.attention import attention_name
from rap_env.models.device import device_kind, free_bytes, keep_freed_memory, uses_float32
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import LeanLlama
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.interface import OnScore, notify
from rap_env.scoring.lean_passes import LeanPasses
from rap_env.scoring.plan_runner import (
    Node,
    OnLogits,
    PlanRunner,
    StateCache,
    as_one_batch,
    branch_nodes,
    chunks,
    sharing_order,
    token_nll,
    tokens_at_once,
    window_nll,
)
from rap_env.scoring.store import ScoreStore

METRIC = "window_nll"
"""The store's metric for the scores of a text: one value per window."""

_BATCH_TOKENS = 1024
_PREFIX_BYTES = 512 * 2**20
_MOST_TOGETHER = 64
_LEAN_TOGETHER = 32
_FILLING_TOKENS = 2**14  # of a batch that keeps a large GPU busy
_WORKING_STATES = 24  # a block's inner activations, in hidden states, roughly
_LOSS_VERSION = 2  # raised when the same numbers are computed in another order


class PlanScorer:
    """Measures the model's NLL under plans, on a text cut into windows.

    Each window of T tokens is scored on its own (stride T, no context before it) and gives
    T - 1 predictions. Plans run in the order of a prefix tree over blocks: each plan starts
    at the last state that it shares with a plan that ran before. The result equals that of a
    whole pass bit for bit, because the same operations run on the same tensors. On an
    accelerator, where several plans may share a batch, it is equal up to the dtype's
    rounding.

    Lowered caches are those of `rap_env.levels`: a score is what decoding token by token
    would give.

    Args:
        llm: The live model; its plan is restored after each call.
        text: A corpus, or token ids of shape (windows, T).
        store: Keeps scores between runs; None keeps them in this object only.
        batch_tokens: Tokens of one forward pass; windows are batched up to this number.
        prefix_cache_bytes: Most bytes of hidden states kept for sharing. If they do not
            suffice for every step of a plan, the states of every second (third, ...) step are
            kept.
        masks_together: Most plans that share a batch; None is 1 on a CPU, and
            as many as fill an accelerator.

    Attributes:
        runner: Runs plans on the text and counts blocks.
        evaluations: Plans that the model ran; those found in the store do not count.
        stride: The states of every `stride`-th step of a plan are kept.
        context: What determines the scores, besides the plan; part of their keys in the
            store.

    Raises:
        CorpusError: The windows are shorter than two tokens, or longer than the model's
            positions.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        text: Corpus | torch.Tensor,
        store: ScoreStore | None = None,
        *,
        batch_tokens: int = _BATCH_TOKENS,
        prefix_cache_bytes: int = _PREFIX_BYTES,
        masks_together: int | None = None,
    ) -> None:
        keep_freed_memory()
        self.llm = llm
        self.corpus = text if isinstance(text, Corpus) else Corpus.of_tokens(text)
        self.store = store
        self.evaluations = 0
        tokens = self.corpus.tokens
        length = tokens.shape[1]
        if not 2 <= length <= llm.facts.max_positions:
            raise CorpusError(
                f"A window must have from 2 to {llm.facts.max_positions} tokens (the positions "
                f"of {llm.name}), not {length}."
            )
        rows = max(1, batch_tokens // length)
        batches = tuple(batch.to(llm.device) for batch in torch.split(tokens, rows))
        self._lean = LeanPasses(llm) if isinstance(llm.model, LeanLlama) else None
        whole = self._lean is not None
        width = masks_together or (_LEAN_TOGETHER if whole else _batch_width(llm, batches[0]))
        partial_forward = PartialForward(llm, widen=True, whole=whole)
        cache = StateCache(prefix_cache_bytes)
        self.runner = PlanRunner(partial_forward, batches, cache, width)
        state_bytes = tokens.numel() * llm.facts.hidden_size * llm.facts.itemsize
        path_bytes = len(partial_forward.steps) * state_bytes
        self.stride = max(1, -(-path_bytes // max(1, prefix_cache_bytes)))
        self._scores: dict[Plan, npt.NDArray[np.float64]] = {}
        self._memory = MemoryModel(llm)
        self._parts: dict[tuple[int, ...], PlanScorer] = {}  # by the numbers of their windows
        self._part_windows = 0  # windows that parts ran, summed over plans
        self.context: Mapping[str, Any] = {
            **model_context(llm),
            "tokens": self.corpus.sha256,
            "shape": list(tokens.shape),
            "batch_windows": rows,
            "head_tokens": tokens_at_once(llm.device, llm.facts.vocab_size)[0],
            "loss": _LOSS_VERSION,
            **({"masks_together": width} if width > 1 else {}),  # rounding differs
        }

    def release(self) -> None:
        """Free the hidden states and the widened weights that are kept for later calls."""
        self.runner.cache.clear()
        self.runner.partial.release()
        for part in self._parts.values():
            part.release()

    @property
    def batches(self) -> Sequence[torch.Tensor]:
        """The windows as the model runs them, each of shape (rows, T), on the model's device."""
        return self.runner.batches

    @property
    def block_forwards(self) -> float:
        """Blocks that the model ran, in passes over the whole text; parts count by their share."""
        shares = ((part, part.num_windows / self.num_windows) for part in self._parts.values())
        parts = sum(part.block_forwards * share for part, share in shares)
        return self.runner.block_runs / len(self.batches) + parts

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, text and everything else that determines the scores, for artifacts."""
        facts = self.llm.facts
        return {
            "model": facts.name,
            "fingerprint": facts.fingerprint,
            "text": self.corpus.provenance,
            "scoring": dict(self.context),
        }

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return len(self.corpus.tokens)

    @property
    def passes(self) -> float:
        """Plans that the model ran; one run on a part of the text counts as that part."""
        return self.evaluations + self._part_windows / self.num_windows

    @cached_property
    def evaluation_s(self) -> float:
        """Seconds that one pass of the native model over the text takes, measured once."""
        alone = PlanRunner(self.runner.partial, self.batches, StateCache(0))
        began = time.perf_counter()
        self._values(alone, [Plan()], keep=())
        return time.perf_counter() - began

    @property
    def known(self) -> int:
        """Plans asked for so far, stored ones included: what an empty store would have to run."""
        return len(self._scores)

    @property
    def native_nll(self) -> float:
        """NLL of the native model, nats per token."""
        return self.nll(Plan())

    def is_predicted(self, _plan: Plan) -> bool:
        """Never: a live model measures all scores."""
        return False

    def nll(self, plan: Plan) -> float:
        """Mean NLL of the text under a plan, nats per token.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        return float(self.window_nll(plan).mean())

    def window_nll(self, plan: Plan) -> npt.NDArray[np.float64]:
        """Mean NLL of each window under a plan, nats per token, shape (windows,)."""
        values = self.look_up(plan)
        if values is None:
            self._measure([plan], self._path(plan))
            values = self._scores[plan]
        return values

    def nll_many(self, plans: Sequence[Plan], on_score: OnScore | None = None) -> list[float]:
        """NLL of several plans, in their order; steps that they share run once.

        Args:
            plans: Plans to score; repeated ones are measured once.
            on_score: Called after each finished one, for progress bars.
        """
        known = [values for plan in plans if (values := self.look_up(plan)) is not None]
        # The common case in a vector environment.
        if on_score is None and len(known) == len(plans):
            return [float(values.mean()) for values in known]
        order = partial(sharing_order, num_blocks=self.llm.facts.num_blocks)
        distinct = sorted(set(plans), key=order)
        missing = [plan for plan in distinct if self.look_up(plan) is None]
        branches = branch_nodes(missing, self.runner.partial.steps)
        for group in chunks(missing, self.runner.width):
            last = group[-1] is missing[-1]
            self._measure(group, branches | self._path(group[-1]) if last else branches)
            notify(on_score, group)
        measured = set(missing)
        notify(on_score, [plan for plan in distinct if plan not in measured])
        return [self.nll(plan) for plan in plans]

    def nll_on(self, plans: Sequence[Plan], windows: Sequence[int]) -> list[float]:
        """NLL of several plans on some windows of the text only, nats per token.

        A plan that is known on the whole text is not run again. Nothing is stored for the
        others, because the NLL of a part is not a score of the text.

        Args:
            plans: Plans to score; repeated ones are measured once.
            windows: Numbers of the windows, at least one.
        """
        chosen = tuple(windows)
        known = {plan: self.look_up(plan) for plan in plans}
        nll = {p: float(v[list(chosen)].mean()) for p, v in known.items() if v is not None}
        missing = [plan for plan in known if plan not in nll]
        if missing:
            part = self._part(chosen)
            ran = part.evaluations
            nll |= dict(zip(missing, part.nll_many(missing), strict=True))
            self._part_windows += (part.evaluations - ran) * len(chosen)
        return [nll[plan] for plan in plans]

    def look_up(self, plan: Plan) -> npt.NDArray[np.float64] | None:
        """NLL of each window if it is known, shape (windows,), or None.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
        """
        if (known := self._scores.get(plan)) is not None:
            return known
        self._memory.check_plan(plan)
        values = None if self.store is None else self.store.get(self.context, plan, METRIC)
        if values is not None:
            self._scores[plan] = np.array(values)
        return self._scores.get(plan)

    def record(self, plan: Plan, values: npt.NDArray[np.float64]) -> None:
        """Store the measured NLL of each window under a plan, shape (windows,).

        Raises:
            NonFiniteScoreError: A value is NaN or infinite; nothing is stored.
        """
        if not np.isfinite(values).all():
            self.runner.cache.clear()  # the states on the way may be non-finite too
            raise NonFiniteScoreError(
                f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite NLL ({plan}); check "
                "the weights, or load the model with dtype='float32'."
            )
        if self.store is not None:
            self.store.put(self.context, plan, METRIC, values.tolist())
        self._scores[plan] = values

    def _path(self, plan: Plan) -> set[Node]:
        """The nodes of one plan that are kept for the plans of later calls."""
        return set(list(enumerate(self.runner.prefixes(plan)[:-1]))[:: self.stride])

    def _part(self, windows: tuple[int, ...]) -> PlanScorer:
        """The scorer of some windows, kept: a plan that was measured there is known."""
        if windows not in self._parts:
            share = len(windows) / self.num_windows
            self._parts[windows] = type(self)(
                self.llm,
                self.corpus.tokens[list(windows)],
                batch_tokens=self.batches[0].numel(),
                prefix_cache_bytes=int(self.runner.cache.max_bytes * share),
                masks_together=self.runner.width,
            )
        return self._parts[windows]

    def _measure(self, plans: Sequence[Plan], keep: Collection[Node]) -> None:
        values = self._values(self.runner, plans, keep)
        for plan, row in zip(plans, values, strict=True):
            self.record(plan, row)
        self.evaluations += len(plans)

    def _values(
        self, runner: PlanRunner, plans: Sequence[Plan], keep: Collection[Node]
    ) -> npt.NDArray[np.float64]:
        """Mean NLL of each window for each plan, (plans, windows); caches the states of `keep`."""
        if self._lean is not None:
            return self._lean_values(self._lean, plans)
        parts = []
        with self.llm.applied(Plan()):
            for batch, ids in enumerate(runner.batches):
                last = runner.run(batch, plans, partial(runner.cache.put_some, keep, batch))
                nll: dict[Plan, torch.Tensor] = {}
                for level, group in runner.share_head(plans):
                    tokens, on_logits = ids.repeat(len(group), 1), self._on_logits(batch, group)
                    with runner.partial.embeddings(level):
                        hidden = runner.partial.leave(as_one_batch([last[plan] for plan in group]))
                        rows = window_nll(runner.partial, hidden, tokens, on_logits)
                    nll |= dict(zip(group, rows.view(len(group), -1), strict=True))
                parts.append(torch.stack([nll[plan] for plan in plans]))
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy(), dtype=np.float64)

    def _lean_values(self, passes: LeanPasses, plans: Sequence[Plan]) -> npt.NDArray[np.float64]:
        """Mean NLL of each window under plans of a tiny model that run together."""
        parts = []
        with torch.inference_mode(), self.llm.exclusive():
            for batch, ids in enumerate(self.batches):
                logits, runs = passes(plans, ids)
                targets = ids[:, 1:].reshape(-1)
                on_logits = self._on_logits(batch, plans)
                losses = [token_nll(rows, targets) for rows in logits]
                parts.append(torch.stack(losses).view(len(plans), len(ids), -1).double().mean(2))
                self.runner.block_runs += runs
                if on_logits is not None:
                    for rows in logits:
                        on_logits(rows)
        return np.asarray(torch.cat(parts, dim=1).numpy())

    def _on_logits(self, _batch: int, _plans: Sequence[Plan]) -> OnLogits | None:
        """What also reads the logits of plans for one of the `batches`."""
        return None


def model_context(llm: ElasticLLM) -> dict[str, Any]:
    """What determines any score of a model, including the rounding of its last bit."""
    return {
        **llm.facts.identity,
        "device": device_kind(llm.device),
        "attention": attention_name(llm.model),
        "threads": torch.get_num_threads() if llm.device.type == "cpu" else 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"bfloat16_products": "float32"} if uses_float32(llm.device, llm.dtype) else {}),
    }


def _batch_width(llm: ElasticLLM, ids: torch.Tensor) -> int:
    """Number of plans whose states share a batch; `ids` is the first batch of the text.

    One plan's batch saturates a CPU (two plans in one batch were no faster), so on a CPU each
    plan has its own batch, which keeps scores bit for bit those of single passes. On an
    accelerator it is the power of two that fills it and its memory. By sizes alone: a width
    that is timed varies between runs, and with it the rounding of scores.
    """
    if llm.device.type == "cpu":
        return 1
    state_bytes = ids.numel() * llm.facts.hidden_size * llm.facts.itemsize
    within = free_bytes(llm.device) // (2 * _WORKING_STATES * state_bytes)
    most = min(_MOST_TOGETHER, _FILLING_TOKENS // ids.numel(), within)
    return 1 << max(0, most.bit_length() - 1)
