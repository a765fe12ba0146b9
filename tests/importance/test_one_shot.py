"""One-shot scores: loss rise, and the influence of each block on the residual stream."""

import itertools

import numpy as np
import pytest
import torch

from rap_env.importance.one_shot import block_influence, layer_influence, one_shot
from rap_env.ladder.features import ImportanceFeatures
from rap_env.plan import Plan
from rap_env.scoring.scorer import PlanScorer
from tests.scoring.test_scorer import tokens
from tests.tiny import VOCAB_SIZE, tiny_llm


def test_delta_nll_is_measured_block_by_block():
    scorer = PlanScorer(tiny_llm(), tokens())
    profile = one_shot(scorer, progress=False)
    expected = [scorer.nll(Plan.removing(i)) - scorer.native_nll for i in range(4)]
    assert profile.delta_nll == pytest.approx(expected)
    assert profile.evaluations == 5
    assert profile.provenance["text"]["tokens"] == 27


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
    with torch.no_grad():
        llm.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox_sequential"])
def test_block_influence_follows_the_residual_stream(family):
    """Against the stream itself: the model cut after each block by removing all later ones."""
    llm, ids = tiny_llm(family), tokens()
    ends = []
    for kept in range(5):
        with llm.applied(Plan.removing(*range(kept, 4))):
            ends.append(streams(llm, ids)[-1].double())
    expected = [
        float((1 - torch.cosine_similarity(a, b, dim=-1)).mean())
        for a, b in itertools.pairwise(ends)
    ]
    assert block_influence(PlanScorer(llm, ids)) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_features_from_one_shot_rank_by_loss():
    features = ImportanceFeatures.from_one_shot(np.array([3.0, 0.0, 1.0]))
    assert features.gsi_rank.tolist() == [1.0, 0.0, 0.5]
    assert ImportanceFeatures.none(3).one_shot.tolist() == [0, 0, 0]


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
    with llm.applied(Plan.removing(0, 1)):
        assert layer_influence(llm, [ids]).tolist() == dense.tolist()
