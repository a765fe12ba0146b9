"""Transformers' own `generate` for a model whose mask may change between any two steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rap_env.errors import UnsupportedCacheError, check_name
from rap_env.models.caches.kv_cache import RESTORES, Past, Restore, positions_of, step
from rap_env.models.families.placeholders import cache_in
from rap_env.models.live.lean_llama import reject_lean

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")


def generate(
    llm: Any,
    restore: Restore,
    before_step: Callable[[], object] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run transformers' `generate` on the live model, whose mask other threads may change.

    It runs on a shallow copy of the model, which shares everything with the original except two
    attributes. `forward` first updates the cache to the mask (`models.caches.kv_cache.step`), and
    `prepare_inputs_for_generation` notes the tokens so far, which a refill needs. Arguments and
    errors are those of `ElasticLLM.generate`.
    """
    check_name("restore mode", restore, RESTORES)
    if asked := [name for name in _ASSISTED if kwargs.get(name) is not None]:
        raise UnsupportedCacheError(
            f"generate({asked[0]}=...) removes tokens from the cache again, which is not supported "
            "while the mask may change; leave it out, or call llm.model.generate inside "
            "llm.masked(...)."
        )
    model = llm.model
    reject_lean(model, "generate (use LiveBatch)")
    view = copy.copy(model)
    prepared = _Prepared()

    @functools.wraps(model.prepare_inputs_for_generation)
    def prepare(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = model.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = inputs.get("input_ids")
        prepared.ids, prepared.given = input_ids, kwargs
        prepared.new_tokens = 0 if new is None else new.shape[1]
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
        # A compiled forward would not notice that modules were replaced.
        return view.generate(*args, **{"disable_compile": True, **kwargs})
    finally:
        prepared.given = {}  # it keeps the cache alive


@dataclass
class _Prepared:
    """The step that `generate` has prepared.

    Attributes:
        ids: All tokens so far, (B, T), or None.
        given: The arguments of the preparation.
        new_tokens: Tokens of the step.
    """

    ids: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: int = 0

    def past(self) -> Past | None:
        """The tokens in the cache, or None if `generate` was not given all of them."""
        if self.ids is None or not self.new_tokens:
            return None
        length = int(cache_in(self.given).get_seq_length())
        if self.ids.shape[1] != length + self.new_tokens:
            return None
        mask, positions = (self.given.get(n) for n in ("attention_mask", "position_ids"))
        if mask is None:  # generate leaves it out where nothing is padded
            mask = torch.ones_like(self.ids)
        if mask.dim() != 2:
            return None
        if positions is None or positions.shape != self.ids.shape:
            positions = positions_of(mask)
        return Past(self.ids[:, :length], mask[:, :length], positions[:, :length])
