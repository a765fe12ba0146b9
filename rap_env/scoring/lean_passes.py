"""Many plans of a lean model at a time: what several share runs once, in large products.

A tiny model spends its time on calling operations rather than in them. So the plans advance
together, a block at a time: a block runs once for all plans that agree so far, and states that
run a block at the same level are in one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import LeanLlama
from rap_env.models.weights.packed_modules import PackedModule
from rap_env.plan import EMBEDDINGS, Plan, block_name, cache_name

Levels = tuple[str, ...]
"""The level of a block's weights, and of the cache of an attention block."""


class LeanPasses:
    """Runs plans of a lean model; R windows of T tokens, H hidden width.

    Results differ from those of single passes by the rounding of float32.

    Args:
        llm: The model, whose weights at each level are widened once and kept.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._llm = llm
        self._model: LeanLlama = llm.model
        self._decoder: Any = self._model.model
        self._blocks: dict[tuple[int, Levels], nn.Module] = {}
        self._ends: dict[str, tuple[nn.Module, nn.Module]] = {}

    def __call__(self, plans: Sequence[Plan], ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Run plans on token ids, (R, T).

        Returns:
            Logits of all tokens but the last of each window, (plans, R * (T - 1), V), and the
            number of blocks that ran, one for each state.
        """
        ends = [self._ends_at(plan.embeddings) for plan in plans]
        at_levels = list(dict.fromkeys(plan.embeddings for plan in plans))
        states = torch.stack([self._ends_at(level)[0](ids) for level in at_levels])  # (S, R, T, H)
        at = [at_levels.index(plan.embeddings) for plan in plans]
        rotary = self._decoder.rotary_emb(torch.arange(ids.shape[1])[None], states.dtype)
        runs = 0
        for index in range(self._llm.num_blocks):
            own = [_levels(plan, index) for plan in plans]
            ways = list(zip(at, own, strict=True))
            by_level: dict[Levels, list[int]] = {}
            for state, way in dict.fromkeys(ways):
                by_level.setdefault(way, []).append(state)
            parts, numbers = [], dict[tuple[int, Levels], int]()
            for level, entering in by_level.items():
                numbers |= {(s, level): len(numbers) + n for n, s in enumerate(entering)}
                entered = states[entering]
                if level[0] != "removed":
                    runs += len(entering)
                    entered += self._change(index, level, entered, rotary)
                parts.append(entered)
            states = torch.cat(parts)
            at = [numbers[way] for way in ways]
        hidden = self._decoder.norm(states[:, :, :-1])
        rows = [
            head(hidden[state]).flatten(0, 1) for state, (_, head) in zip(at, ends, strict=True)
        ]
        return torch.stack(rows), runs

    def _change(self, index: int, level: Levels, states: torch.Tensor, rotary: Any) -> torch.Tensor:
        """What a block adds to states, (S, R, T, H)."""
        layer, flat = self._decoder.layers[index // 2], states.flatten(0, 1)
        block = self._block(index, level)
        if index % 2:
            change = block(layer.post_attention_layernorm(flat))
        else:
            normed = layer.input_layernorm(flat)
            change, _ = block(normed, mask=None, rotary=rotary, cache=None)
        return torch.Tensor.view_as(change, states)

    def _block(self, index: int, levels: Levels) -> nn.Module:
        if (index, levels) not in self._blocks:
            names = block_name(index), cache_name(index // 2)
            with self._llm.applied(Plan.of(dict(zip(names, levels, strict=False)))):
                layer = self._decoder.layers[index // 2]
                block = _widened(layer.mlp if index % 2 else layer.self_attn)
            self._blocks[index, levels] = block
        return self._blocks[index, levels]

    def _ends_at(self, level: str) -> tuple[nn.Module, nn.Module]:
        """Embeddings and head at a level."""
        if level not in self._ends:
            with self._llm.applied(Plan.of({EMBEDDINGS: level})):
                both = self._decoder.embed_tokens, self._model.get_output_embeddings()
            self._ends[level] = _widened(both[0]), _widened(both[1])
        return self._ends[level]


def _levels(plan: Plan, index: int) -> Levels:
    weights = plan.weight_level(index)
    return (weights,) if index % 2 else (weights, plan.cache_level(index // 2).name)


def _widened(module: nn.Module) -> nn.Module:
    """A module that computes with unquantised weights, whatever the model's plan becomes."""
    if isinstance(module, PackedModule):
        return module.widened()
    wide = copy.copy(module)
    wide._modules = {name: _widened(part) for name, part in module.named_children()}
    return wide
