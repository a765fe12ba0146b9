"""Transformers' own `generate` on a model whose mask may change between any two of its steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rap_env.errors import UnsupportedCacheError
from rap_env.llm.live import Past, Restore, positions_of, step
from rap_env.llm.removed import cache_in

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")


def generate(
    llm: ElasticLLM,
    restore: Restore,
    before_step: Callable[[], object] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run transformers' `generate` on the live model, whose mask other threads may change.

    It is given a shallow copy of the model, which shares everything with the original but two
    attributes: its forward pass first brings mask and cache together (`rap_env.llm.live.step`), and
    what it needs for that, the tokens so far, is what `generate` prepares each pass from.

    Args:
        llm: The live model.
        restore: For attention blocks that come back.
        before_step: Called before each forward pass, or None.
        args: Of ``generate``.
        kwargs: Of ``generate``.
    """
    _refuse_assisted(kwargs)
    model = llm.model
    view = copy.copy(model)
    prepared = _Prepared()

    @functools.wraps(model.prepare_inputs_for_generation)
    def prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = model.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        prepared.note(input_ids, kwargs, inputs)
        return inputs

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if before_step is not None:
            before_step()
        with step(llm, cache_in(kwargs), restore, prepared.past):
            return model.forward(*args, **kwargs)

    view.prepare_inputs_for_generation = prepare
    view.forward = forward
    try:
        # A compiled forward would not see that modules were swapped.
        return view.generate(*args, **{"disable_compile": True, **kwargs})
    finally:
        prepared.forget()  # what it noted holds the cache


class _Prepared:
    """What `generate` prepared its next forward pass from."""

    def __init__(self) -> None:
        self._ids: Any = None
        self._given: Mapping[str, Any] = {}
        self._new = 0

    def note(self, input_ids: Any, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        new = inputs.get("input_ids")
        self._ids, self._given = input_ids, given
        self._new = 0 if new is None else new.shape[1]

    def forget(self) -> None:
        self._ids, self._given, self._new = None, {}, 0

    def past(self) -> Past | None:
        """What the cache holds, or None if the tokens that made it were never given."""
        if self._ids is None or not self._new:
            return None
        length = int(cache_in(self._given).get_seq_length())
        if self._ids.shape[1] != length + self._new:
            return None
        mask, positions = (self._given.get(n) for n in ("attention_mask", "position_ids"))
        if mask is None:  # generate leaves it out where nothing is padded
            mask = torch.ones_like(self._ids)
        if mask.dim() != 2:
            return None
        if positions is None or positions.shape != self._ids.shape:
            positions = positions_of(mask)
        return Past(self._ids[:, :length], mask[:, :length], positions[:, :length])


def _refuse_assisted(kwargs: Mapping[str, Any]) -> None:
    asked = [name for name in _ASSISTED if kwargs.get(name) is not None]
    if asked:
        raise UnsupportedCacheError(
            f"generate({asked[0]}=...) takes back tokens that were already in the cache, which a "
            "mask that may change does not allow; leave it out, or call llm.model.generate under "
            "llm.masked(...)."
        )
