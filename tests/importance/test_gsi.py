"""GSI: the order of the naive loop, whole after an interruption, refused for another model."""

import json

import numpy as np
import pytest
import torch

from rap_env.blocks import BlockMask
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance import GSIProfile, gsi
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import ScoreStore
from tests.scoring.test_scorer import plain_nll, tokens
from tests.tiny import tiny_llm


def naive_order(llm, ids, removals):
    """The loop as research code writes it: a whole forward pass for each candidate."""
    removed, order, levels = BlockMask(), [], []
    for _ in range(removals):
        left = [block for block in llm.blocks if block not in removed]
        nll = [np.mean(plain_nll(llm, ids, removed | BlockMask.of(block))) for block in left]
        order.append(left[int(np.argmin(nll))])
        levels.append(min(nll))
        removed = removed | BlockMask.of(order[-1])
    return order, levels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_gsi_is_the_naive_loop(seed):
    llm, ids = tiny_llm(layers=4, seed=seed), tokens()
    profile = gsi(MaskScorer(llm, ids), progress=False)
    order, levels = naive_order(llm, ids, 8)
    assert list(profile.order) == order
    assert profile.nll_after == pytest.approx(levels, rel=2e-5)
    assert profile.evaluations == profile.evaluations_run == 1 + sum(range(1, 9))


def test_a_warm_store_does_not_make_the_method_look_cheaper(tmp_path):
    llm, ids, store = tiny_llm(layers=3), tokens(), ScoreStore(tmp_path / "scores.sqlite")
    cold = gsi(MaskScorer(llm, ids, store), progress=False)
    warm = gsi(MaskScorer(llm, ids, store), progress=False)
    assert warm.evaluations == cold.evaluations == cold.evaluations_run
    assert warm.evaluations_run == 0


def test_profile_says_what_each_block_costs():
    llm, ids = tiny_llm(layers=3), tokens()
    scorer = MaskScorer(llm, ids)
    profile = gsi(scorer, stop=2, progress=False)
    assert len(profile.order) == 2
    first, second = profile.order_indices
    dense = scorer.dense_nll
    single = [scorer.nll(BlockMask.of(i)) - dense for i in range(6)]
    assert profile.first_pass == pytest.approx(single)
    assert profile.marginal_loss[first] == pytest.approx(single[first])
    for other in set(range(6)) - {first}:
        rise = scorer.nll(BlockMask.of(first, other)) - scorer.nll(BlockMask.of(first))
        assert profile.marginal_loss[other] == pytest.approx(rise)
    rest = sorted(set(range(6)) - {first, second}, key=lambda i: profile.marginal_loss[i])
    assert profile.full_order == (first, second, *rest)
    assert profile.rank[first] == 0
    assert profile.rank[rest[-1]] == 1


def test_interrupted_and_continued_gives_the_same(tmp_path):
    llm, ids, path = tiny_llm(layers=3), tokens(), tmp_path / "gsi.json"
    whole = gsi(MaskScorer(llm, ids), progress=False)
    gsi(MaskScorer(llm, ids), stop=2, path=path, progress=False)
    scorer = MaskScorer(llm, ids)
    continued = gsi(scorer, path=path, progress=False)
    assert scorer.evaluations == sum(range(1, 5))  # neither dense nor the first rounds again
    assert continued.order == whole.order
    assert continued.nll_after == whole.nll_after
    assert continued.evaluations == whole.evaluations
    assert GSIProfile.load(path, llm) == continued


def test_a_kill_while_saving_leaves_the_previous_round(tmp_path, monkeypatch):
    llm, ids, path = tiny_llm(layers=3), tokens(), tmp_path / "gsi.json"
    gsi(MaskScorer(llm, ids), stop=1, path=path, progress=False)

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        gsi(MaskScorer(llm, ids), stop=2, path=path, progress=False)
    monkeypatch.undo()
    assert len(GSIProfile.load(path, llm).order) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["gsi.json"]


def test_another_models_artifact_is_refused(tmp_path):
    path = tmp_path / "gsi.json"
    gsi(MaskScorer(tiny_llm(), tokens()), stop=1, path=path, progress=False)
    for other in (tiny_llm(seed=1), tiny_llm(dtype=torch.bfloat16)):
        with pytest.raises(ArtifactError, match="other weights or another dtype"):
            GSIProfile.load(path, other)
    with pytest.raises(ArtifactError, match="on other text"):
        gsi(MaskScorer(tiny_llm(), tokens(seed=1)), path=path, progress=False)


@pytest.mark.parametrize("damage", ["cut", "edited", "kind", "format", "no json"])
def test_a_damaged_artifact_is_refused(tmp_path, damage):
    llm, path = tiny_llm(), tmp_path / "gsi.json"
    gsi(MaskScorer(llm, tokens()), stop=1, path=path, progress=False)
    text = path.read_text()
    document = json.loads(text)
    document["body"]["dense_nll"] += 1
    path.write_text(
        {
            "cut": text[: len(text) // 2],
            "edited": json.dumps(document),
            "kind": text.replace("GSI profile", "shopping list"),
            "format": text.replace('"version": 1', '"version": 7'),
            "no json": "[1, 2]",
        }[damage]
    )
    with pytest.raises(ArtifactError, match=r"truncated|altered|of the kind|has format"):
        GSIProfile.load(path, llm)


def test_unknown_method():
    with pytest.raises(UnknownNameError, match="GSI method 'fast'; known are 'exact'"):
        gsi(MaskScorer(tiny_llm(), tokens()), method="fast")
