"""A live model follows plans: levels of caches, and the facts that the arithmetic needs."""

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.levels import NATIVE_CACHE, CacheLevel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from tests.tiny import FAMILIES, LAYERS, padded_batch, tiny_llm, tiny_model

INT4 = CacheLevel.of("int4")
PLAN = Plan.of({"layer00.cache": "int4", "layer01.ffn": "removed"})
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def attention(llm: ElasticLLM, layer: int) -> torch.nn.Module:
    return llm.adapter.layers(llm.model)[layer].get_submodule(llm.adapter.family.attn)


def levels(llm: ElasticLLM) -> list[CacheLevel | None]:
    return [getattr(attention(llm, n), "cache_level", None) for n in range(LAYERS)]


@EVERY_FAMILY
def test_attention_modules_carry_the_levels_of_their_caches(name: str) -> None:
    llm = tiny_llm(name)
    llm.apply(PLAN)
    assert (llm.plan, llm.mask) == (PLAN, Plan.removing(3))
    assert (llm.plan.cache_level(0), llm.plan.cache_level(1)) == (INT4, NATIVE_CACHE)
    assert levels(llm) == [INT4, None]
    llm.apply(PLAN.without(0))
    assert llm.plan == Plan.removing(0, 3)
    llm.apply(Plan())
    assert levels(llm) == [None, None]
    assert llm.plan == Plan()


def test_a_plan_is_restored_after_a_with_block() -> None:
    llm = tiny_llm()
    llm.apply(PLAN)
    uniform = Plan.uniform(LAYERS, caches="int2")
    with llm.masked(uniform), llm.without({2}):
        assert llm.plan == uniform.without(2)
        assert levels(llm) == [CacheLevel.of("int2"), None]
    assert llm.plan == PLAN
    assert levels(llm) == [INT4, None]
    with llm.masked(Plan()):
        assert levels(llm) == [None, None]
    assert levels(llm) == [INT4, None]


def test_views_share_the_plan() -> None:
    llm = tiny_llm()
    view = llm.repaired({}, "digest")
    llm.apply(PLAN)
    assert view.plan == PLAN


@pytest.mark.parametrize("item", ["layer05.cache", "layer07.ffn"])
def test_an_unknown_item_changes_nothing(item: str) -> None:
    llm = tiny_llm()
    llm.apply(PLAN)
    with pytest.raises(UnknownNameError):
        llm.apply(Plan.of({"layer00.cache": "int8", item: "int8"}))
    assert llm.plan == PLAN


@EVERY_FAMILY
def test_facts_describe_what_a_cache_holds(name: str) -> None:
    llm = ElasticLLM(tiny_model(name), None, name=name)
    with torch.no_grad():
        cache = llm.model(**padded_batch(), use_cache=True).past_key_values
    for layer, held in enumerate(cache.layers):
        shape = (llm.facts.kv_heads[layer], llm.facts.kv_head_size[layer])
        assert (held.keys.shape[1], held.keys.shape[3]) == shape
        assert held.values.shape == held.keys.shape
