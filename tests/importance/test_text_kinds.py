"""Kinds of text told by their tokens, and costs of levels by kind with the file that keeps them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import ArtifactError
from rap_env.importance.text_kinds import KindCosts, TextKinds, mean_costs, mean_shares
from rap_env.memory import MemoryModel
from tests.policies.test_knapsack import costs, facts

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


FEW_TOKENS = 40


def made(vocab_size=FEW_TOKENS, **changed):
    return facts(packed=True, vocab_size=vocab_size, **changed)


def kind_costs(model, **changed):
    """Costs on two kinds of text, whose tokens are the lower and the upper half of the ids."""
    half = model.vocab_size // 2
    rng = np.random.default_rng(0)
    texts = {"prose": rng.integers(0, half, 400), "code": rng.integers(half, 2 * half, 400)}
    kinds = TextKinds.of(texts, model.vocab_size)
    joint = json.loads('{"{}": 0.5}')
    return KindCosts(
        kinds, {name: costs(model, seed, joint=joint) for seed, name in enumerate(texts)}, **changed
    )


def test_the_mean_weighs_kinds_by_their_shares():
    found = kind_costs(made())
    prose, code = (
        found.costs[name].one_shot["layer00.ffn"]["removed"] for name in ("prose", "code")
    )
    assert prose != code

    def mean(*shares):
        return found.mean(shares).one_shot["layer00.ffn"]["removed"]

    assert mean(1.0, 0.0) == prose
    assert mean(0.25, 0.75) == pytest.approx(0.25 * prose + 0.75 * code)
    assert mean() == pytest.approx((prose + code) / 2), "text of no kind"
    assert found.mean((0.25, 0.75)).joint == {"{}": 0.5}
    texts = [found.mean(shares).provenance["text"] for shares in ((), (0.0, 1.0))]
    assert [text["windows"] for text in texts] == [2, 1], "the texts that the costs are from"


def test_costs_without_a_common_mean_are_rejected():
    one, other = (costs(made(), window_tokens=tokens) for tokens in (512, 1024))
    with pytest.raises(ArtifactError, match=r"windows of \[512, 1024\] tokens have no common mean"):
        mean_costs([one, other])
    with pytest.raises(ArtifactError, match="name different items"):
        mean_costs([one, costs(made(), caches=("int8",))])


def test_kinds_and_costs_have_the_same_names_in_the_same_order():
    found = kind_costs(made())
    with pytest.raises(ArtifactError, match="code, prose need the tokens of these kinds"):
        replace(found, costs=dict(reversed(found.costs.items())))


def test_a_file_keeps_them_in_their_order(tmp_path):
    model, path = MemoryModel(made()), tmp_path / "kinds.json"
    found = kind_costs(model.facts)
    found.save(path)
    again = KindCosts.load(path, model)
    assert list(again.costs) == again.kinds.names == ["prose", "code"]
    assert again.costs == found.costs
    for prompt in ([1, 2, 3, 30], [25, 33], []):
        assert again.kinds.shares(prompt) == found.kinds.shares(prompt)


def test_a_file_of_another_model_is_rejected(tmp_path):
    path = tmp_path / "kinds.json"
    kind_costs(made()).save(path)
    for other, why in (
        (made(fingerprint="b" * 64), "with other weights"),
        (facts(packed=False, vocab_size=FEW_TOKENS), "was measured with packed weights"),
        (made(vocab_size=50), "a vocabulary of 40 tokens, but made has 50"),
    ):
        with pytest.raises(ArtifactError, match=why):
            KindCosts.load(path, MemoryModel(other))
    save_artifact(path, "level costs", 1, {})
    with pytest.raises(ArtifactError):
        KindCosts.load(path, MemoryModel(made()))
    with pytest.raises(FileNotFoundError):
        KindCosts.load(tmp_path / "none.json", MemoryModel(made()))
