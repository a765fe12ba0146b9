"""GSI: equal to the naive loop, resumable, rejected for another model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rap_env.blocks import block_name
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance.gsi_search import gsi
from rap_env.importance.profiles import GSIProfile
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.store import ScoreStore
from tests.scoring.removals import removals, scan
from tests.scoring.test_scorer import plain_nll, tokens
from tests.tiny import tiny_llm


def naive_order(llm, ids, count):
    """The loop as research code writes it: a whole forward pass for each candidate."""
    removed, order, levels = Plan(), [], []
    for _ in range(count):
        plans = removals(llm.num_blocks, removed)
        nll = {block: np.mean(plain_nll(llm, ids, plan)) for block, plan in plans.items()}
        order.append(min(nll, key=nll.__getitem__))
        levels.append(nll[order[-1]])
        removed = removed.without(order[-1])
    return order, levels


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_exact_gsi_is_the_naive_loop(seed):
    llm, ids = tiny_llm(layers=4, seed=seed), tokens()
    profile = gsi(MaskScorer(llm, ids), progress=False)
    order, levels = naive_order(llm, ids, 8)
    assert list(profile.order) == [block_name(block) for block in order]
    assert profile.nll_after == pytest.approx(levels, rel=2e-5)
    assert profile.evaluations == profile.evaluations_run == 1 + sum(range(1, 9))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gpt_neox", torch.bfloat16),
        ("mixtral", torch.float32),
    ],
)
def test_exact_gsi_equals_scans_of_all_blocks(family, dtype):
    llm = tiny_llm(family, layers=5, dtype=dtype)
    scorer = MaskScorer(llm, tokens(windows=6), batch_tokens=18)
    removed, order, levels = Plan(), [], []
    for _ in range(5):
        nll = scan(MaskScorer(llm, tokens(windows=6), batch_tokens=18), removed)
        order.append(min(nll, key=lambda block: (nll[block], block)))
        levels.append(nll[order[-1]])
        removed = removed.without(order[-1])
    profile = gsi(scorer, stop=5, progress=False)
    assert list(profile.order) == [block_name(block) for block in order]
    assert list(profile.nll_after) == levels  # bit for bit
    assert profile.candidates == tuple(10 - i for i in range(5))


@pytest.fixture(scope="module")
def deep():
    """A model of 12 layers, and its exact profile of 10 removals."""
    llm = tiny_llm(layers=12)
    return llm, gsi(MaskScorer(llm, tokens(windows=8)), stop=10, progress=False)


@pytest.mark.slow
def test_lazy_measures_less_and_is_nearly_as_good(deep):
    (llm, exact), ids = deep, tokens(windows=8)
    quick = gsi(MaskScorer(llm, ids), stop=10, method="lazy", progress=False)
    assert quick.method == "lazy"
    assert len(set(quick.order_indices)) == 10
    assert quick.block_forwards < exact.block_forwards
    assert sum(quick.candidates) < sum(exact.candidates)
    assert quick.candidates[0] == 24  # nothing is known before the first round
    assert quick.evaluations == 1 + sum(quick.candidates)
    rise, best = (profile.nll_after[-1] - profile.dense_nll for profile in (quick, exact))
    assert rise <= best + 0.01 * exact.dense_nll
    assert set(quick.last_rises) == set(map(block_name, range(llm.num_blocks))) - set(quick.order)


@pytest.mark.parametrize(("good", "bad", "examined"), [(-9.0, -10.0, 15), (9.0, 10.0, 8)])
def test_lazy_measures_more_items_if_one_has_risen(good, bad, examined, tmp_path):
    """All of them if each loses more than any was last known to, else a few."""
    scorer, path = MaskScorer(tiny_llm(layers=8), tokens()), tmp_path / "gsi.json"
    nll = {block_name(block): value for block, value in scan(scorer, Plan.removing(0)).items()}
    next_to_it = "layer00.ffn"
    ranked = sorted(set(nll) - {next_to_it}, key=nll.__getitem__)
    known = dict.fromkeys(ranked[:7], good) | dict.fromkeys(ranked[7:], bad) | {next_to_it: 99.0}
    begun = gsi(scorer, stop=1, method="lazy", progress=False)
    replace(
        begun, order=("layer00.attn",), nll_after=(scorer.nll(Plan.removing(0)),), last_rises=known
    ).save(path)
    profile = gsi(scorer, stop=2, method="lazy", path=path, progress=False)
    assert profile.candidates[-1] == examined
    assert nll[profile.order[-1]] == min(nll.values())


def test_lazy_is_exact_about_what_it_measured():
    llm, ids = tiny_llm(layers=8), tokens()
    profile = gsi(scorer := MaskScorer(llm, ids), stop=5, method="lazy", progress=False)
    masks = [Plan.removing(*profile.order_indices[: i + 1]) for i in range(5)]
    assert list(profile.nll_after) == scorer.nll_many(masks)


def test_a_warm_store_does_not_reduce_the_reported_cost(tmp_path):
    llm, ids, store = tiny_llm(layers=3), tokens(), ScoreStore(tmp_path / "scores.sqlite")
    cold = gsi(MaskScorer(llm, ids, store), progress=False)
    warm = gsi(MaskScorer(llm, ids, store), progress=False)
    assert warm.evaluations == cold.evaluations == cold.evaluations_run
    assert warm.evaluations_run == 0


def test_the_profile_has_the_cost_of_each_block():
    llm, ids = tiny_llm(layers=3), tokens()
    scorer = MaskScorer(llm, ids)
    profile = gsi(scorer, stop=2, progress=False)
    assert len(profile.order) == 2
    first, second = profile.order_indices
    dense = scorer.dense_nll
    single = [scorer.nll(Plan.removing(i)) - dense for i in range(6)]
    assert profile.first_pass == pytest.approx(single)
    assert profile.marginal_delta_nll[first] == pytest.approx(single[first])
    for other in set(range(6)) - {first}:
        rise = scorer.nll(Plan.removing(first, other)) - scorer.nll(Plan.removing(first))
        assert profile.marginal_delta_nll[other] == pytest.approx(rise)
    rest = sorted(set(range(6)) - {first, second}, key=lambda i: profile.marginal_delta_nll[i])
    assert profile.full_order == (first, second, *rest)
    assert profile.rank[first] == 0
    assert profile.rank[rest[-1]] == 1


@pytest.mark.parametrize("method", ["exact", "lazy"])
def test_interrupted_and_resumed_gives_the_same_result(method, tmp_path):
    llm, ids, path = tiny_llm(layers=4), tokens(windows=4), tmp_path / "gsi.json"
    whole = gsi(MaskScorer(llm, ids), method=method, progress=False)
    gsi(MaskScorer(llm, ids), stop=2, method=method, path=path, progress=False)
    scorer = MaskScorer(llm, ids)
    continued = gsi(scorer, method=method, path=path, progress=False)
    assert scorer.evaluations == sum(whole.candidates[2:])  # neither dense nor the first rounds
    for name in ("order", "nll_after", "candidates", "evaluations"):
        assert getattr(continued, name) == getattr(whole, name)
    assert GSIProfile.load(path, llm) == continued
    with pytest.raises(ArtifactError, match=f"method='{method}' on .*, not with"):
        gsi(scorer, method={"exact": "lazy", "lazy": "exact"}[method], path=path, progress=False)


def test_another_models_artifact_is_rejected(tmp_path):
    path = tmp_path / "gsi.json"
    gsi(MaskScorer(tiny_llm(), tokens()), stop=1, path=path, progress=False)
    for other in (tiny_llm(seed=1), tiny_llm(dtype=torch.bfloat16)):
        with pytest.raises(ArtifactError, match="other weights or another dtype"):
            GSIProfile.load(path, other)
    with pytest.raises(ArtifactError, match="not with 'exact' on this text"):
        gsi(MaskScorer(tiny_llm(), tokens(seed=1)), path=path, progress=False)


def test_unknown_method():
    with pytest.raises(UnknownNameError, match="GSI method 'fast'; known are 'exact', 'lazy'"):
        gsi(MaskScorer(tiny_llm(), tokens()), method="fast")


def test_an_order_of_a_model_with_stubs_is_rejected(tmp_path):
    llm, path = tiny_llm(), tmp_path / "gsi.json"
    profile = gsi(MaskScorer(llm, tokens()), stop=1, progress=False)
    scoring = {**profile.provenance["scoring"], "repair": "r" * 64}
    replace(profile, provenance={**profile.provenance, "scoring": scoring}).save(path)
    with pytest.raises(ArtifactError, match=r"gsi\.json was measured or made with stubs"):
        GSIProfile.load(path, llm)
