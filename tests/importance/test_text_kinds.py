"""Kinds of text told by their tokens: own text, other text, and shares in steps of an eighth."""

import numpy as np
import pytest

from rap_env.errors import ArtifactError
from rap_env.importance.text_kinds import TextKinds, mean_shares

VOCAB = 500


def text(kind, tokens=1024, seed=0):
    """Tokens of one of three kinds that share a third of their common words."""
    rng = np.random.default_rng([kind, seed])
    common = np.arange(20)
    own = 100 * (kind + 1) + np.arange(60)
    words = np.concatenate([common, own])
    weights = 1 / (1 + np.arange(len(words)) % 20)
    return rng.choice(words, tokens, p=weights / weights.sum())


@pytest.fixture(scope="module")
def kinds():
    return TextKinds.of({"prose": text(0), "code": text(1).reshape(4, 256)}, VOCAB)


def test_prompts_of_a_kind_are_told_by_a_few_tokens(kinds):
    assert kinds.names == ["prose", "code"]
    for number in range(2):
        found = np.array([kinds.shares(text(number, 32, seed)) or (0, 0) for seed in range(1, 40)])
        assert found[:, number].mean() > 0.9
        assert found[:, 1 - number].mean() < 0.05


def test_text_of_another_kind_is_of_none(kinds):
    found = [kinds.shares(text(2, 64, seed)) for seed in range(1, 40)]
    assert sum(not shares for shares in found) > 35
    own = [kinds.shares(text(0, 64, seed)) for seed in range(1, 40)]
    assert sum(not shares for shares in own) < 4


def test_a_prompt_of_two_kinds_has_shares_of_both(kinds):
    halves = np.concatenate([text(0, 64, 5), text(1, 64, 5)])
    assert kinds.shares([]) == ()
    assert kinds.shares(halves[::-1]) == kinds.shares(halves), "the order of tokens does not count"
    found = kinds.shares(np.arange(20))  # the words that both have
    assert sum(found) == 1
    assert min(found) > 0


def test_shares_of_several_prompts_are_their_mean_in_steps_of_an_eighth():
    assert mean_shares([]) == mean_shares([(), ()]) == ()
    assert mean_shares([(1.0, 0.0), (0.0, 1.0)]) == (0.5, 0.5)
    assert mean_shares([(1.0, 0.0), ()]) == (0.75, 0.25), "a prompt of no kind has equal shares"
    thirds = mean_shares([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
    assert sum(thirds) == 1
    assert set(thirds) == {0.375, 0.25}


def test_a_kind_needs_text():
    with pytest.raises(ArtifactError, match="not by none"):
        TextKinds.of({}, VOCAB)
    with pytest.raises(ArtifactError, match="at least 256 tokens of each, not by 100 of code"):
        TextKinds.of({"prose": text(0), "code": text(1, 100)}, VOCAB)
    alone = TextKinds.of({"prose": text(0)}, VOCAB)
    assert alone.shares(text(0, 64, 1)) == (1.0,)
    assert alone.shares(text(1, 64, 1)) == ()
