from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rap_env.blocks import BlockMask
from rap_env.importance.one_shot_scores import layer_influence
from tests.tiny import VOCAB_SIZE, tiny_llm


def streams(llm, ids):
    """What enters each layer, and what leaves the last one, by hooks on a usual pass."""
    seen = []
    layers = list(llm.adapter.layers(llm.model))

    def enters(_layer, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leaves(_layer, _args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leaves))
    with torch.inference_mode():
        llm.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_is_one_minus_the_cosine_across_each_layer(name):
    llm = tiny_llm(name, layers=3)
    batches = [
        torch.randint(3, VOCAB_SIZE, (rows, 8), generator=torch.Generator().manual_seed(rows))
        for rows in (2, 1)
    ]
    found = layer_influence(llm, batches)
    cosines = []
    for ids in batches:
        states = [state.double() for state in streams(llm, ids)]
        pairs = itertools.pairwise(states)
        cosines.append([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
    expected = [1 - torch.cat(parts).mean() for parts in zip(*cosines, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(found) == 3


def test_is_that_of_the_dense_model():
    llm = tiny_llm()
    ids = torch.arange(3, 11)[None]
    dense = layer_influence(llm, [ids])
    with llm.masked(BlockMask.of(0, 1)):
        assert layer_influence(llm, [ids]).tolist() == dense.tolist()
