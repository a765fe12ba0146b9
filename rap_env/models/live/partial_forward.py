"""Forward passes in parts, without a copy of any `forward`: one block at a time, or some positions.

The model's own code runs unchanged. Its decoder is called once with layers that only record
their arguments (positions, rotary tables, attention masks). After that any layer can be
called with the same arguments on any hidden state. A single block runs as its layer with the
other block removed. Packed weights are widened once and kept while many rows run through
them, as in scoring.

The head runs on some entries of its vocabulary at a time (`head_nll`, `head_divergences`): its
weights are widened in parts, so that neither they nor all logits are in memory as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import nn

from rap_env.levels import WeightLevel
from rap_env.models import device
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import reject_lean
from rap_env.models.weights.packed_modules import PackedEmbedding, PackedModule
from rap_env.models.weights.packing import BLOCK
from rap_env.plan import Plan

_FEW_TOKENS = 4096
"""Embeddings of larger vocabularies are not widened: a text reads few of their rows."""

WIDENED_BYTES = 2**30
"""Most bytes of widened weights that the scorers of one model keep; the head's may exceed
them."""


class WidenedWeights:
    """Widens the weights of packed modules once, and computes with them in a ``with`` block.

    Scores must not depend on how much memory there is. So a module whose widened weights are
    not kept is widened for each call, and its own kernels are not used in the ``with`` block.

    Args:
        dtype: Of the widened weights; None for the model's own.

    Attributes:
        max_bytes: Most bytes of widened weights that are kept, besides heads. The first ones
            are kept: modules run in turn, so replacing the oldest would free each before its
            next use.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.max_bytes = WIDENED_BYTES
        self._dtype = dtype
        self._kept: weakref.WeakKeyDictionary[PackedModule, nn.Module] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> WidenedWeights:
        """The widened weights of a model, which all that use it at the same time share."""
        weights = _shared.get(id(model))
        if weights is None:
            weights = _shared[id(model)] = cls()
        return weights

    @property
    def held_bytes(self) -> int:
        """Bytes of the widened weights that are kept."""
        return sum(map(_weight_bytes, list(self._kept.values())))

    @contextlib.contextmanager
    def used_in(self, module: nn.Module) -> Iterator[None]:
        """Compute with widened weights in a module, such as a layer or a decoder."""
        packed = [
            part
            for part in module.modules()
            if isinstance(part, PackedModule)
            and not (isinstance(part, PackedEmbedding) and part.num_embeddings > _FEW_TOKENS)
        ]
        try:
            for part in packed:
                part.__dict__["forward"] = partial(self._run, part)
            yield
        finally:
            for part in packed:
                part.__dict__.pop("forward", None)

    def linear(self, module: nn.Module) -> nn.Module:
        """The head itself, or if it is packed, an unquantised one with the same weights; kept."""
        return self._wide(module, keep=True) if isinstance(module, PackedModule) else module

    def clear(self) -> None:
        """Free all kept weights."""
        self._kept.clear()

    def _run(self, module: PackedModule, *args: Any, **kwargs: Any) -> Any:
        return self._wide(module)(*args, **kwargs)

    def _wide(self, module: PackedModule, *, keep: bool = False) -> nn.Module:
        if module in self._kept:
            return self._kept[module]
        wide = module.widened(self._dtype)
        if keep or self.held_bytes + _weight_bytes(wide) <= self.max_bytes:
            self._kept[module] = wide
        return wide


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


_shared: weakref.WeakValueDictionary[int, WidenedWeights] = weakref.WeakValueDictionary()


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class PartialForward:
    """Runs a live model in steps: the embedding, each block, the last norm, the head.

    Shapes: B sequences, T tokens, H hidden width, V vocabulary. Sequences have no padding.
    The plan that is applied to the model has no effect: each step names the blocks that it
    runs and their levels. Other layers keep their levels, so that no weights are read for
    them.

    Args:
        llm: The live model.
        widen: Whether packed weights are widened once and kept, which is faster for many rows
            (see `rap_env.models.live.partial_forward`).
        gradients: Whether gradients pass through all steps to states that require them. Needs
            `widen`: packed kernels have none.
        whole: Whether only `hidden` and `logits` are used, which a lean model has too.
        short: Whether a float32 model multiplies states and weights in bfloat16, to be faster.
            Needs `widen`.

    Attributes:
        adapter: The family adapter of the model.
        model: The live model.
        steps: Blocks that run together, in order: each block alone, except that both blocks
            of a layer run together if they read the same state (parallel residual).
        layer_steps: The steps of each layer.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        *,
        widen: bool = False,
        gradients: bool = False,
        whole: bool = False,
        short: bool = False,
    ) -> None:
        if not whole:
            reject_lean(llm.model, "run in steps")
        self._llm, self.adapter, self.model = llm, llm.adapter, llm.model
        widened = WidenedWeights(torch.bfloat16) if short else WidenedWeights.of(llm.model)
        self._widened = widened if widen else None
        self._short = short
        self._mode = torch.enable_grad if gradients else torch.inference_mode
        self._decoder = self.adapter.decoder(llm.model)
        self._layers = list(self.adapter.layers(llm.model))
        self._calls: dict[int, list[_Call]] = {}
        step_blocks = 2 if self.adapter.parallel else 1
        count = llm.num_blocks
        self.steps = tuple(tuple(range(b, b + step_blocks)) for b in range(0, count, step_blocks))
        per_layer = 2 // step_blocks
        self.layer_steps = tuple(zip(*[iter(self.steps)] * per_layer, strict=True))

    def enter(self, input_ids: torch.Tensor, embeddings: WeightLevel = "native") -> torch.Tensor:
        """The input of the first layer, (B, T) -> (B, T, H), with embeddings at a level."""
        entered: list[torch.Tensor] = []

        def note(_number: int, hidden: torch.Tensor, _call: _Call) -> torch.Tensor:
            entered.append(hidden)
            return hidden

        with self._mode(), self.embeddings(embeddings):
            self._pass(input_ids, note)
        return entered[0]

    def run(
        self, blocks: tuple[int, ...], state: torch.Tensor, plan: Plan = Plan()
    ) -> torch.Tensor:
        """Run blocks of one layer and no other block, (B, T, H) -> (B, T, H).

        Args:
            blocks: Some of the blocks of one step.
            state: Their input.
            plan: The level of each of these blocks. Other items of the plan have no effect.
        """
        if not blocks:
            return state
        layer, kept, inside = _layer_plan(blocks, plan, self._llm.plan)
        if not kept:
            return state
        wide = self._wide(self._layers[layer])
        with self._mode():
            args, kwargs = self._calls_for(state)[layer]
            with self._llm.applied(inside), wide, self._multiplying():
                output = self._layers[layer](state, *args, **kwargs)
        left: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return left

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """The decoder's output for the output of the last layer, (B, T, H).

        Call it in the ``with`` block of `embeddings` that the head runs in.
        """
        last = len(self._layers) - 1
        with self._mode():
            return self._pass(
                self._placeholder(state), lambda n, hidden, _: state if n == last else hidden
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's head on decoder outputs, (N, H) -> (N, V).

        Contiguous rows, not (B, T, H): torch multiplies a slice of a batch at half the speed.
        """
        with self._mode(), self._multiplying():
            logits: torch.Tensor = self.head(hidden)
            return self.adapter.cap_logits(logits)

    @contextlib.contextmanager
    def loaded(self, layer: Sequence[tuple[int, ...]]) -> Iterator[None]:
        """Keep one layer's weights in memory in a ``with`` block, if the plan has removed it.

        At its end, what was widened is freed, and so are levels of the layer's weights that
        were made in the block. Their memory returns to the system.

        Args:
            layer: Its steps, an entry of `layer_steps`.
        """
        with self._llm.applied(Plan(self._llm.plan.removed.difference(*layer))):
            yield
        self.release()
        if self._llm.residency == "resident":
            for index in itertools.chain(*layer):
                item = self._llm.weight_items[index]
                for level in item.made:
                    item.forget(level)
        device.return_freed_memory()

    def embeddings(self, level: WeightLevel) -> AbstractContextManager[object]:
        """Run embeddings and head at a level in a ``with`` block, without any change for native."""
        if level == "native":
            return contextlib.nullcontext()
        return self._llm.applied(replace(self._llm.plan, embeddings=level))

    @property
    def head(self) -> nn.Linear:
        """The module that computes logits, unquantised if packed weights are widened."""
        head: nn.Linear = self._llm.model.get_output_embeddings()
        return head if self._widened is None else cast(nn.Linear, self._widened.linear(head))

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The decoder's output under the applied plan, (B, T) -> (B, T, H)."""
        with self._llm.exclusive(), self._wide(self._decoder), self._multiplying():
            output = self._decoder(input_ids=input_ids.to(self._llm.device), use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def release(self) -> None:
        """Free the widened weights that are kept."""
        if self._widened is not None:
            self._widened.clear()

    def _multiplying(self) -> AbstractContextManager[object]:
        return device.in_bfloat16() if self._short else device.in_float32(self._llm.dtype)

    def _wide(self, module: nn.Module) -> AbstractContextManager[None]:
        if self._widened is None:
            return contextlib.nullcontext()
        return self._widened.used_in(module)

    def _calls_for(self, state: torch.Tensor) -> list[_Call]:
        """The arguments with which the decoder calls each layer for sequences of this length.

        Recorded for one sequence, they hold for any number: no sequence has padding, so
        positions and attention masks are the same for all, and broadcast.
        """
        length = state.shape[1]
        if length not in self._calls:
            calls: list[_Call] = []

            def note(_number: int, hidden: torch.Tensor, call: _Call) -> torch.Tensor:
                calls.append(call)
                return hidden

            self._pass(self._placeholder(state[:1]), note)
            self._calls[length] = calls
        return self._calls[length]

    def _placeholder(self, state: torch.Tensor) -> torch.Tensor:
        """Token ids for states of this shape; their values have no effect."""
        return torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)

    def _pass(
        self,
        input_ids: torch.Tensor,
        layer: Callable[[int, torch.Tensor, _Call], torch.Tensor],
    ) -> torch.Tensor:
        with self._llm.exclusive(), _replaced_forwards(self._layers, layer):
            output = self._decoder(input_ids=input_ids, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


@lru_cache(maxsize=4096)
def _layer_plan(
    blocks: tuple[int, ...], plan: Plan, present: Plan
) -> tuple[int, tuple[int, ...], Plan]:
    """How a layer runs some of its blocks at their levels, and no other block.

    Returns:
        The layer, the blocks that run, and the plan to apply to the model, which changes
        this layer of the present one.
    """
    layer = blocks[0] // 2
    kept = tuple(block for block in blocks if block not in plan.removed)
    own = frozenset((2 * layer, 2 * layer + 1))
    removed = (present.removed - own) | (own.difference(kept))
    weights = [pair for pair in present.weights if pair[0] not in own]
    weights += [pair for pair in plan.weights if pair[0] in kept]
    caches = [pair for pair in present.caches if pair[0] != layer]
    caches += [pair for pair in plan.caches if 2 * pair[0] in kept]
    return layer, kept, Plan(removed, tuple(weights), tuple(caches), present.embeddings)


@contextlib.contextmanager
def _replaced_forwards(
    layers: list[nn.Module], forward: Callable[[int, torch.Tensor, _Call], torch.Tensor]
) -> Iterator[None]:
    """Replace the `forward` of the layers inside a ``with`` block, as instance attributes."""

    def replacement(number: int) -> Callable[..., torch.Tensor]:
        def called(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return forward(number, hidden_states, (args, kwargs))

        return called

    try:
        for number, layer in enumerate(layers):
            layer.forward = replacement(number)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextlib.contextmanager
def recorded_states(llm: ElasticLLM) -> Iterator[list[torch.Tensor]]:
    """Record the last hidden states of each pass in a ``with`` block, (B, T, width)."""
    states: list[torch.Tensor] = []
    hook = llm.adapter.decoder(llm.model).register_forward_hook(
        lambda _module, _inputs, output: states.append(output.last_hidden_state)
    )
    try:
        yield states
    finally:
        hook.remove()


_HEAD_VALUES = 2**23
"""Entries of the head's weights that are in memory at a time, in float32."""


@torch.no_grad()
def head_nll(
    forward: PartialForward, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NLL of each target, (N,), and the gradient of their sum with respect to `hidden`, (N, H).

    Args:
        forward: Has the head.
        hidden: The decoder's output, (N, H).
        targets: The tokens to predict, (N,).
        gradient: Whether the gradient is computed.
    """
    hidden, targets = hidden.float(), targets.to(hidden.device)
    target_logits = hidden.new_empty(len(hidden))

    def keep(first: int, logits: torch.Tensor) -> None:
        rows, columns = _within(targets, first, logits.shape[1])
        target_logits[rows] = logits[rows, columns]

    (total,) = _log_sums(forward, [hidden], keep)
    nll = total - target_logits
    if not gradient:
        return nll, None
    slope = torch.zeros_like(hidden)
    for first, weight, bias in _parts(forward):
        logits, steepness = _capped(forward, hidden, weight, bias)
        errors = logits.sub_(total[:, None]).exp_()
        rows, columns = _within(targets, first, len(weight))
        errors[rows, columns] -= 1
        slope.addmm_(errors if steepness is None else errors.mul_(steepness), weight)
    return nll, slope


@torch.no_grad()
def head_divergences(
    forward: PartialForward, native: torch.Tensor, others: Sequence[torch.Tensor]
) -> list[float]:
    """KL divergence of the predictions for each of some outputs from those for the native one.

    Args:
        forward: Has the head.
        native: The native model's output of the decoder, (N, H).
        others: The decoder's output under plans, (N, H) each.

    Returns:
        Nats per token.
    """
    hidden = [each.float() for each in (native, *others)]
    native_total, *totals = _log_sums(forward, hidden)
    sums = [0.0] * len(others)
    for _, weight, bias in _parts(forward):
        expected = _capped(forward, hidden[0], weight, bias)[0] - native_total[:, None]
        shares = expected.exp()
        for number, (each, total) in enumerate(zip(hidden[1:], totals, strict=True)):
            logits, _ = _capped(forward, each, weight, bias)
            lost = expected - logits.sub_(total[:, None])
            sums[number] += float(lost.mul_(shares).sum(-1).double().mean())
    return sums


def _log_sums(
    forward: PartialForward,
    hidden: Sequence[torch.Tensor],
    note: Callable[[int, torch.Tensor], object] = lambda first, logits: None,
) -> list[torch.Tensor]:
    """The log of the sum of ``exp(logit)`` over the vocabulary, (N,) for each output (N, H).

    `note` is called with the first entry of each part of the vocabulary and its logits.
    """
    totals = [each.new_full((len(each),), -torch.inf) for each in hidden]
    for first, weight, bias in _parts(forward):
        for number, each in enumerate(hidden):
            logits, _ = _capped(forward, each, weight, bias)
            totals[number] = torch.logaddexp(totals[number], logits.logsumexp(-1))
            note(first, logits)
    return totals


def _parts(forward: PartialForward) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Parts of the head's rows in float32: the first row, weights (rows, H), and biases (rows,)."""
    head: Any = forward.model.get_output_embeddings()
    matrix = head.matrices["weight"] if isinstance(head, PackedModule) else None
    shape = head.weight.shape if matrix is None else matrix.shape
    size = max(BLOCK, _HEAD_VALUES // shape[1] // BLOCK * BLOCK)
    for first in range(0, shape[0], size):
        part = slice(first, min(first + size, shape[0]))
        if matrix is None:
            weight = head.weight[part].to(forward.model.device).float()
        else:
            weight = torch.empty(part.stop - first, shape[1], device=matrix.device)
            matrix.widen(weight, first)
        yield first, weight, None if head.bias is None else head.bias[part].float()


def _capped(
    forward: PartialForward, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of a part of the vocabulary, (N, rows), and their slope under Gemma's soft cap."""
    logits = nn.functional.linear(hidden, weight, bias)
    with torch.enable_grad():
        inner = logits.detach().requires_grad_()
        capped = forward.adapter.cap_logits(inner)
        if capped is inner:
            return inner.detach(), None
        return capped.detach(), torch.autograd.grad(capped.sum(), inner)[0]


def _within(targets: torch.Tensor, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of targets in a part of the vocabulary, and their places there."""
    rows = ((targets >= first) & (targets < first + size)).nonzero()[:, 0]
    return rows, targets[rows] - first
