"""Scores of masks and plans: correct, shared bit for bit, and counted."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from rap_env.errors import CorpusError, NonFiniteScoreError, UnknownNameError
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan, block_name
from rap_env.scoring import plan_runner
from rap_env.scoring.plan_runner import StateCache, branch_nodes, plan_prefixes
from rap_env.scoring.score_table import TableScorer
from rap_env.scoring.scorer import METRIC, PlanScorer
from rap_env.scoring.store import ScoreStore
from tests.envs.tiny_contexts import make_context
from tests.scoring.tiny_table import all_masks, table_of
from tests.tiny import DISTINCT_FAMILIES, FAMILIES, VOCAB_SIZE, each_family, tiny_llm

MASKS = [Plan(), Plan.removing(0), Plan.removing(1), Plan.removing(2), Plan.removing(1, 2, 3),
         Plan.removing(3), Plan.removing(0, 1, 2, 3), Plan.removing(0, 3)]  # fmt: skip


def tokens(windows=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (windows, length), generator=generator)


def plain_nll(llm, ids, mask, **options):
    """The model's own loss, window by window."""
    with torch.no_grad(), llm.applied(mask):
        return [float(llm.model(w[None], labels=w[None], **options).loss) for w in ids]


def removals(num_blocks, base):
    """By block: the plans that also remove one of the blocks that a plan keeps."""
    return {n: base.without(n) for n in range(num_blocks) if n not in base.removed}


def scan(scorer, base):
    """NLL of these plans, by the block."""
    plans = removals(scorer.llm.num_blocks, base)
    return dict(zip(plans, scorer.nll_many(list(plans.values())), strict=True))


CACHES = {"layer00.cache": "int4", "layer01.cache": "int2"}


def text(windows=2, length=50, seed=0):
    """Windows that fill more than one group of a cache."""
    return tokens(windows, length, seed)


def plans_for(llm):
    """Plans that lower some of every kind of item that the model can lower, masks between them."""
    facts = llm.facts
    found = [
        Plan.of(CACHES),
        Plan.of({"layer00.cache": "int8", "layer01.ffn": "removed"}),
        Plan.removing(1),
        Plan.of({"layer01.cache": "int4-window32", "layer00.attn": "removed"}),
    ]
    for level in ("int8", "int4"):
        blocks = [i for i in range(facts.num_blocks) if level in facts.weight_levels(i)]
        if blocks:
            lowered = {block_name(i): level for i in blocks}
            found += [Plan.of(lowered), Plan.of({**lowered, **CACHES})]
            found.append(Plan.of({block_name(blocks[-1]): level}))
        if level in facts.embedding_levels:
            found.append(Plan.of({"embeddings": level, "layer00.ffn": "removed"}))
    return [*found, Plan()]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_models_own_loss(family):
    llm, ids, longer = tiny_llm(family), tokens(), text()
    scorer, on_longer = PlanScorer(llm, ids), PlanScorer(llm, longer)
    for mask in MASKS:
        expected = plain_nll(llm, ids, mask)
        assert scorer.window_nll(mask) == pytest.approx(expected, rel=2e-5), mask
        assert scorer.nll(mask) == pytest.approx(np.mean(expected), rel=2e-5)
    for plan in plans_for(llm):
        expected = plain_nll(llm, longer, plan, use_cache=False)
        assert on_longer.window_nll(plan) == pytest.approx(expected, rel=5e-4), plan


@each_family("family", dtype=[torch.float32, torch.bfloat16])
def test_what_plans_share_changes_no_bit(family, dtype):
    llm = tiny_llm(family, dtype=dtype)
    plans = plans_for(llm)
    for ids, asked in ((tokens(), MASKS), (text(), plans)):
        single = [PlanScorer(llm, ids).nll(plan) for plan in asked]
        assert PlanScorer(llm, ids).nll_many(asked) == single
        one_by_one, few = PlanScorer(llm, ids), PlanScorer(llm, ids, prefix_cache_bytes=1)
        assert [one_by_one.nll(plan) for plan in asked] == single
        assert few.nll_many(asked[::-1]) == single[::-1]
    if dtype == torch.float32:
        assert len(set(single)) == len(plans)  # every level has an effect


@each_family("family", DISTINCT_FAMILIES, dtype=[torch.float32, torch.bfloat16])
def test_masks_that_share_a_batch_differ_by_rounding_alone(family, dtype):
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    llm, ids = tiny_llm(family, layers=3, dtype=dtype), tokens()
    scan = [Plan.removing(2, index) for index in (0, 1, 3, 4, 5)]
    nothing_shared = [Plan.removing(0, 4), Plan.removing(1), Plan.removing(0, 1, 3), Plan()]
    masks = scan + nothing_shared
    single = [PlanScorer(llm, ids).nll(mask) for mask in masks]
    for width in (2, 4, 16):
        together = PlanScorer(llm, ids, masks_together=width)
        assert together.nll_many(masks) == pytest.approx(single, abs=rounding)
        assert together.evaluations == len(masks)
        assert together.block_forwards <= sum(6 - len(mask.removed) for mask in masks)


def test_sharing_saves_blocks_whatever_the_cache_holds():
    llm, ids = tiny_llm(layers=6), tokens()
    base = Plan.removing(4)
    expected = None
    work = []
    for cache_bytes in (1, 3 * ids.numel() * 16 * 4, 2**30):
        scorer = PlanScorer(llm, ids, batch_tokens=9, prefix_cache_bytes=cache_bytes)
        nll = scan(scorer, base)
        expected = expected or nll
        assert nll == expected
        assert scorer.evaluations == 11
        work.append(scorer.block_forwards)
    assert work[0] == 11 * 10  # nothing kept: each of 11 masks runs its 10 blocks
    assert work[0] > work[1] > work[2]
    # Masks in order of their first departure: layer 5 last, each layer's own work alone.
    assert work[2] <= 0.65 * work[0]


def test_the_context_distinguishes_models_texts_dtypes_and_batches():
    ids = tokens()
    contexts = [
        PlanScorer(tiny_llm(), ids).context,
        PlanScorer(tiny_llm(seed=1), ids).context,
        PlanScorer(tiny_llm(dtype=torch.bfloat16), ids).context,
        PlanScorer(tiny_llm(), tokens(seed=1)).context,
        PlanScorer(tiny_llm(), ids.reshape(9, 3)).context,
        PlanScorer(tiny_llm(), ids, batch_tokens=18).context,
    ]
    assert len({str(context) for context in contexts}) == 6
    assert PlanScorer(tiny_llm(), ids).context == contexts[0]


def test_a_failed_pass_leaves_model_and_later_scores_right():
    llm, ids = tiny_llm(), tokens()
    expected = PlanScorer(llm, ids).nll(Plan.removing(2))
    scorer = PlanScorer(llm, ids)
    scorer.nll(Plan())
    weight = llm.model.get_decoder().layers[1].mlp.down_proj.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteScoreError, match=r"removed ffn 0.*float32"):
        scorer.nll(Plan.removing(1))
    weight.data.copy_(kept)
    assert llm.plan == Plan()
    assert scorer.evaluations == 1
    assert scorer.nll(Plan.removing(2)) == expected


def test_the_mask_in_force_does_not_matter_and_stays():
    llm, ids = tiny_llm(), tokens()
    expected = PlanScorer(llm, ids).nll(Plan.removing(1))
    with llm.applied(Plan.removing(0, 3)):
        assert PlanScorer(llm, ids).nll(Plan.removing(1)) == expected
        assert llm.plan == Plan.removing(0, 3)


@pytest.mark.parametrize(
    ("dtype", "head_tokens"), [(torch.float32, 5), (torch.bfloat16, 1), (torch.bfloat16, 256)]
)
def test_the_loss_in_pieces_equals_the_loss(dtype, head_tokens, monkeypatch):
    monkeypatch.setattr(plan_runner, "HEAD_TOKENS", head_tokens)
    llm, ids = tiny_llm(dtype=dtype), tokens()
    with torch.inference_mode():
        logits = llm.model(ids).logits[:, :-1].double()
        hidden = llm.adapter.decoder(llm.model)(input_ids=ids, use_cache=False).last_hidden_state
    expected = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    ).view(3, -1)
    nll = plan_runner.window_nll(PartialForward(llm), hidden, ids)
    assert nll.dtype == torch.float64
    assert nll.tolist() == pytest.approx(expected.mean(dim=1).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.ones(2, 1, dtype=torch.long), "from 2 to 64 tokens"),
        (torch.ones(1, 65, dtype=torch.long), "not 65"),
        (torch.ones(3, dtype=torch.long), "shape"),
        (torch.ones(2, 4), "whole numbers"),
        (torch.ones(0, 4, dtype=torch.long), "at least one window"),
    ],
)
def test_impossible_windows(ids, text):
    with pytest.raises(CorpusError, match=text):
        PlanScorer(tiny_llm(), ids)


def test_a_block_that_the_model_lacks():
    scorer = PlanScorer(tiny_llm(), tokens())
    for plan in (Plan.removing(4), Plan.of({"layer02.cache": "int4"})):
        with pytest.raises(UnknownNameError, match=r"layer02\.attn"):
            scorer.nll_many([plan])
    assert scorer.evaluations == 0


def test_a_part_of_the_text_has_the_nll_of_its_windows_and_counts_as_that_part(tmp_path):
    store = ScoreStore(tmp_path / "scores.sqlite")
    scorer = PlanScorer(tiny_llm(), tokens(windows=4, length=8), store)
    masks = [Plan(), Plan.removing(1), Plan.removing(0, 3), Plan.removing(1, 2)]
    found = scorer.nll_on([*masks, masks[0]], [0, 2])
    work = scorer.passes, scorer.block_forwards
    assert work[0] == len(masks) / 2
    assert 0 < work[1] <= sum(4 - len(mask.removed) for mask in masks) / 2
    assert scorer.nll_on(masks, [0, 2]) == found[:4]
    assert (scorer.passes, scorer.block_forwards) == work, "it is known by now"
    assert scorer.evaluations == scorer.known == len(store) == 0, "no part is stored"
    whole = [scorer.window_nll(mask) for mask in masks]
    np.testing.assert_allclose(found[:4], [nll[[0, 2]].mean() for nll in whole], rtol=1e-5)
    passes = scorer.passes
    assert scorer.nll_on(masks, [1, 3]) == [nll[[1, 3]].mean() for nll in whole]
    assert scorer.passes == passes == work[0] + len(masks), "known from the whole text"


def test_a_table_has_one_part_the_whole_text():
    context = make_context()
    scorer = TableScorer(table_of(context, all_masks(6)))
    masks = [Plan.removing(1), Plan.removing(0, 3)]
    assert scorer.num_windows == 1
    assert scorer.nll_on(masks, [0]) == context.scorer.nll_many(masks)
    assert scorer.passes == 0


def test_plans_are_stored_beside_masks_and_not_run_again(tmp_path):
    llm, ids = tiny_llm(), text()
    plans = plans_for(llm)
    first = PlanScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    values = first.nll_many(plans)
    again = PlanScorer(llm, ids, ScoreStore(tmp_path / "s.sqlite"))
    assert again.nll_many(plans) == values
    assert again.evaluations == again.block_forwards == 0
    stored = dict(again.store.rows(again.context, METRIC))
    assert stored == {plan: again.window_nll(plan).tolist() for plan in plans}


def test_plans_share_the_steps_before_the_first_that_differs():
    llm, ids = tiny_llm(layers=4), text()
    scorer = PlanScorer(llm, ids)
    scorer.nll_many([
        Plan(),
        Plan.of({"layer03.cache": "int4"}),  # blocks 6 and 7 run again
        Plan.of({"layer03.cache": "int8", "layer03.ffn": "removed"}),  # 6
        Plan.of({"layer03.cache": "int4", "layer03.ffn": "removed"}),  # none
        Plan.removing(7),  # none
    ])  # fmt: skip
    assert scorer.block_forwards == 8 + 2 + 1
    assert scorer.evaluations == 5


def test_plans_that_differ_in_the_embeddings_share_nothing():
    llm = tiny_llm("llama_tied")
    scorer = PlanScorer(llm, text())
    lowered = Plan(embeddings="int8")
    scorer.nll_many([Plan(), lowered, Plan.removing(3), lowered.without(3)])
    assert scorer.block_forwards == 4 + 4
    assert scorer.nll(lowered) != scorer.native_nll


def test_a_part_of_a_batch_does_not_keep_the_batch():
    """Several plans run in one batch, and few of their states are kept."""
    batch = torch.arange(64.0).reshape(16, 4)
    cache = StateCache(48)
    for number, part in enumerate(torch.split(batch, 1)):
        cache.put(0, (number, Plan()), part)
    kept = [cache.get(0, (number, Plan())) for number in range(13, 16)]
    assert [list(one[0]) for one in kept] == batch[13:].tolist()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    assert sum(held.values()) == cache.held_bytes == 48


def test_branches_are_where_later_masks_leave():
    steps = tuple((block,) for block in range(8))
    first, second, third = Plan.removing(1), Plan.removing(1, 6), Plan.removing(0)
    # The first two leave each other before block 6, the third leaves both before block 0.
    assert branch_nodes([first, second, third], steps) == {(6, first), (0, Plan())}
    assert branch_nodes([Plan.removing(0, 2)], steps) == set()
    assert branch_nodes([], steps) == set()


def test_with_its_branches_kept_every_prefix_runs_once():
    draw, steps = random.Random(0), tuple((block,) for block in range(8))
    for _ in range(50):
        rows = sorted({tuple(draw.getrandbits(1) for _ in range(8)) for _ in range(12)})
        masks = [Plan.removing(*(i for i, bit in enumerate(row) if bit)) for row in rows]
        kept = branch_nodes(masks, steps)
        have, ran = set(), []
        for mask in masks:
            path = list(enumerate(plan_prefixes(mask, steps)))
            start = max((n for n, node in enumerate(path) if node in have), default=0)
            ran += path[start + 1 :]
            have |= kept & set(path)
        assert len(ran) == len(set(ran))
