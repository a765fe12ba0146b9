"""Costs by kind of text: their mean, and the file that keeps them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rap_env.artifacts import save_artifact
from rap_env.errors import ArtifactError
from rap_env.importance.text_kinds import KindCosts, TextKinds, mean_costs
from rap_env.memory import MemoryModel
from tests.policies.test_knapsack import costs, facts

VOCAB = 40


def made(vocab_size=VOCAB, **changed):
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
        (facts(packed=False, vocab_size=VOCAB), "was measured with packed weights"),
        (made(vocab_size=50), "a vocabulary of 40 tokens, but made has 50"),
    ):
        with pytest.raises(ArtifactError, match=why):
            KindCosts.load(path, MemoryModel(other))
    save_artifact(path, "level costs", 1, {})
    with pytest.raises(ArtifactError):
        KindCosts.load(path, MemoryModel(made()))
    with pytest.raises(FileNotFoundError):
        KindCosts.load(tmp_path / "none.json", MemoryModel(made()))
