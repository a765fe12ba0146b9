"""Importance of a ladder's items in contexts: measured once, packaged, or from a score table."""

from dataclasses import asdict, replace

import pytest

from rap_env.context import live as live_module
from rap_env.context.base import item_order, make_encoder
from rap_env.context.live import PACKAGED_COSTS, LiveContext
from rap_env.context.table import TableContext
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.importance import gradient_costs
from rap_env.importance.level_costs import LevelCosts
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes, mask_bytes
from rap_env.levels import LADDERS
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.packaged_files import default_facts
from rap_env.scoring.corpus import Corpus
from tests.envs.playing import DENSE_TIMING, LEVELS, make_ladder, play
from tests.envs.tiny_contexts import make_ladder_context
from tests.scoring.tiny_table import all_masks, table_of

CACHES = LEVELS["caches"]


def ladder_of(context, caches=CACHES) -> Ladder:
    return Ladder.of(context.memory.facts, {**LEVELS, "caches": caches})


def bytes_of(context) -> LadderBytes:
    return LadderBytes(context.memory, ladder_of(context))


@pytest.fixture
def computed(monkeypatch):
    """The levels of caches whose costs were computed, for each time."""
    levels, compute = [], gradient_costs.gradient_costs

    def noted(llm, text, by_item, **options):
        levels.append(tuple(by_item["layer00.cache"]))
        return compute(llm, text, by_item, **options)

    monkeypatch.setattr(gradient_costs, "gradient_costs", noted)
    return levels


def test_costs_are_computed_once_and_kept(tmp_path, computed):
    first = make_ladder_context(folder=tmp_path)
    costs = first.level_costs(ladder_of(first))
    assert first.level_costs(ladder_of(first)) is costs
    again = make_ladder_context(folder=tmp_path)
    assert again.level_costs(ladder_of(again)) == costs
    assert computed == [tuple(CACHES)]
    fewer = again.level_costs(ladder_of(again, ["int8"]))  # other levels, another file
    assert "int4" not in fewer.costs["layer00.cache"]
    assert computed == [tuple(CACHES), ("int8",)]


@pytest.mark.parametrize("source", ["self", "tokens"])
def test_packaged_costs_are_used_for_self_written_text_where_they_fit(
    tmp_path, monkeypatch, source, computed
):
    made = make_ladder_context()
    made.level_costs(ladder_of(made)).save(tmp_path / "packaged.json")
    computed.clear()
    monkeypatch.setattr(live_module, "PACKAGED_COSTS", tmp_path / "packaged.json")
    context = make_ladder_context()
    context.scorer.corpus = Corpus.of_tokens(context.corpus.tokens, source=source)
    context.level_costs(ladder_of(context, CACHES[:2]))
    assert (not computed) == (source == "self")
    context.level_costs(ladder_of(context, ["int2"]))  # not among them
    assert computed[-1] == ("int2",)


def test_the_package_has_costs_of_the_named_ladders():
    memory = MemoryModel(default_facts())
    costs = LevelCosts.load(PACKAGED_COSTS, memory)
    assert {level.name for level in costs.cache_levels} >= set(LADDERS["all"]["caches"])
    for name in LADDERS:
        ladder = Ladder.of(memory.facts, name)
        for item in ladder.items:
            assert set(item.levels[1:]) <= set(costs.costs[item.name])


def test_no_importance_measures_nothing():
    context = make_ladder_context(importance="none")
    found = make_encoder(context, "ladder", LEVELS, ()).importance
    assert not any(array.any() for array in vars(found).values())
    make_ladder(context)
    assert context.scorer.evaluations == 0


@pytest.fixture(scope="module")
def live() -> LiveContext:
    return make_ladder_context()


@pytest.fixture(scope="module")
def table(live):
    """A table of all masks and of costs, without plans."""
    made = table_of(live, all_masks(6))
    return replace(made, levels=asdict(live.level_costs(ladder_of(live))))


def test_a_table_has_the_costs_and_the_order_of_the_live_model(live, table, tmp_path):
    table.save(tmp_path / "t.json")
    context = TableContext(type(table).load(tmp_path / "t.json"), "t", importance="one_shot")
    assert context.level_costs(ladder_of(context)) == live.level_costs(ladder_of(live))
    assert item_order(context, bytes_of(live)).steps == item_order(live, bytes_of(live)).steps
    with pytest.raises(ArtifactError, match="no costs of caches at level int2, only of native"):
        context.level_costs(ladder_of(context, ["int2"]))
    bare = TableContext(replace(table, levels=None), "t", importance="one_shot")
    with pytest.raises(ArtifactError, match="has no costs of levels"):
        bare.level_costs(ladder_of(bare))
    with pytest.raises(ArtifactError, match="no GSI over items; pass importance='one_shot'"):
        item_order(context, bytes_of(live), "gsi")
    masks = mask_bytes(live.memory)
    assert context.item_gsi(masks).order == live.gsi.order


def test_other_plans_are_predicted_and_flagged(live, table):
    context = TableContext(table, "t", importance="one_shot")
    cost = live.level_costs(ladder_of(live)).cost("layer00.cache", "int4")
    plan = Plan.of({"layer00.cache": "int4", "layer01.ffn": "removed"})
    assert context.scorer.is_predicted(plan)
    predict = table.predictor.delta_nll
    removal = Plan.removing("layer01.ffn")
    rise = predict(removal, cost) - predict(removal)  # on top of the measured removal
    assert context.scorer.nll(plan) == pytest.approx(live.scorer.nll(removal) + rise)
    assert rise >= 0
    infos = [info for *_, info in play(make_ladder(context, reward=DENSE_TIMING), 0)]
    lowered = [info for info in infos if set(info["levels"]) - {"native", "removed"}]
    assert lowered
    assert all(info["predicted"] for info in lowered)
    with pytest.raises(UnknownNameError, match="Without costs of levels, only removals"):
        TableContext(replace(table, levels=None), "t", importance="one_shot").scorer.nll(plan)
