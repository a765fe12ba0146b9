"""Stubs on live models: exact, reversible, shared by view and base, and their bytes."""

import copy
import gc

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.files.streamed import stream_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.live.test_elastic import EVERY_MASK, MASKS, NUM_BLOCKS
from tests.models.states import logits, saved
from tests.models.stubs import RANKS, random_stubs, repaired
from tests.tiny import each_family, tiny_llm, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
SOME = Plan.removing(0, 3)


def hooked(llm: ElasticLLM, stubs, mask: Plan):
    """A copy of the dense model in which hooks put a stub's output in each masked block's place.

    All modules run; nothing of how this project removes blocks is used.
    """
    model = copy.deepcopy(llm.model)
    family = llm.adapter.family
    for index in sorted(mask.removed):
        layer = llm.adapter.layers(model)[index // 2]
        norms = family.attn_norms if index % 2 == 0 else family.ffn_norms
        module = family.attn if index % 2 == 0 else family.ffn[-1]
        last = norms[1] if len(norms) == 2 else module  # Gemma has a norm behind the block too
        entered = []

        def note(_module, args, kwargs, entered=entered):
            entered[:] = [args[0] if args else kwargs["hidden_states"]]

        def put(_module, _args, output, entered=entered, stub=stubs[index]):
            added = stub(entered[0])
            return (added, *output[1:]) if isinstance(output, tuple) else added

        layer.get_submodule(norms[0]).register_forward_pre_hook(note, with_kwargs=True)
        layer.get_submodule(last).register_forward_hook(put)
    return model


@pytest.mark.engine_feature("here", "Stubs", "all")
@each_family("name", dtype=DTYPES)
def test_a_repaired_mask_equals_a_model_with_manual_stubs(name, dtype) -> None:
    llm = tiny_llm(name, dtype=dtype)
    stubs = random_stubs(llm)
    view = llm.repaired(stubs, "random")
    for mask in [*MASKS.values(), *map(Plan.removing, range(NUM_BLOCKS))]:
        expected = logits(hooked(llm, stubs, mask))
        with view.masked(mask):
            assert torch.equal(logits(view), expected), mask
        with llm.masked(mask):
            assert not torch.equal(logits(llm), expected), mask


class TestSharing:
    """A view and its base show one model under one mask."""

    @pytest.fixture
    def pair(self) -> tuple[ElasticLLM, ElasticLLM]:
        llm = tiny_llm()
        return llm, repaired(llm)

    def test_a_mask_applied_to_either_view_affects_both(self, pair) -> None:
        llm, view = pair
        view.apply(SOME)
        assert llm.plan.mask == view.plan.mask == SOME
        with_stubs = logits(llm)
        llm.apply(SOME)  # the same mask, without stubs
        assert view.plan.mask == SOME
        without = logits(view)
        assert not torch.equal(with_stubs, without)
        with tiny_llm().masked(SOME) as plain:
            assert torch.equal(without, logits(plain))
        view.apply(SOME)
        assert torch.equal(logits(llm), with_stubs)
        llm.apply(Plan())
        assert view.plan.mask == Plan()

    @pytest.mark.parametrize("inner", [SOME, Plan.removing(0), Plan.removing(1), Plan()], ids=str)
    @pytest.mark.parametrize("view_outside", [True, False])
    def test_masks_of_both_nest(self, pair, view_outside: bool, inner: Plan) -> None:
        outer, other = pair[::-1] if view_outside else pair
        with outer.masked(SOME):
            before = logits(outer)
        with other.masked(inner):
            expected = logits(other)
        with outer.masked(SOME):
            with other.masked(inner):
                assert torch.equal(logits(other), expected)
                assert outer.plan.mask == inner
            assert outer.plan.mask == SOME
            assert torch.equal(logits(outer), before)
        assert list(outer.model.state_dict()) == list(tiny_model().state_dict())

    def test_an_exception_restores_the_previous_stubs(self, pair) -> None:
        llm, view = pair
        with view.masked(SOME):
            before = logits(view)
            with pytest.raises(KeyboardInterrupt), llm.masked(MASKS["everything"]):
                raise KeyboardInterrupt
            with pytest.raises(UnknownNameError), view.masked(Plan.removing(99)):
                pytest.fail("the mask should not have been applied")
            assert torch.equal(logits(view), before)

    def test_a_view_of_a_view_uses_only_its_own_stubs(self, pair) -> None:
        llm, view = pair
        other = view.repaired({3: random_stubs(llm, seed=1)[3]}, "other")
        assert (other.facts.repair, view.facts.repair, llm.facts.repair) == (
            "other", "random-0", "",
        )  # fmt: skip
        assert [other.has_stub([block]) for block in range(NUM_BLOCKS)] == [False] * 3 + [True]
        with other.masked(Plan.removing(0)):
            actual = logits(llm)
        with llm.masked(Plan.removing(0)):
            assert torch.equal(logits(llm), actual)


def test_removed_blocks_without_stubs_leave_no_module() -> None:
    llm = tiny_llm()
    stubs = random_stubs(llm)
    view, single = llm.repaired(stubs, "random"), llm.repaired({0: stubs[0]}, "one")
    with view.masked(SOME, bare=Plan.removing(3)):
        assert view.plan.mask == SOME
        actual = logits(view)
    with single.masked(SOME):
        assert torch.equal(logits(single), actual)
    with view.masked(SOME, bare=SOME):
        actual = logits(view)
    with llm.masked(SOME):
        assert torch.equal(logits(llm), actual)
    assert single.has_stub([0, 3])
    assert not single.has_stub([1, 2, 3])
    assert not llm.has_stub(range(NUM_BLOCKS))


def test_the_view_has_the_weights_fingerprint_and_facts_of_its_own() -> None:
    llm = tiny_llm()
    plain = llm.facts
    view = repaired(llm)
    assert view.fingerprint == llm.fingerprint
    assert view.facts.block_param_bytes == llm.facts.block_param_bytes
    assert llm.facts is plain
    assert (plain.repair, plain.stub_bytes) == ("", ())
    assert view.facts.repair == "random-0"
    assert plain.identity == {"model": llm.fingerprint, "dtype": "float32"}
    assert view.facts.identity == {**plain.identity, "repair": "random-0"}
    with view.masked(MASKS["everything"]):  # stubs in the tree are no weights of the model
        assert repaired(tiny_llm()).facts == view.facts
        again = ElasticLLM(tiny_model(), None, name="tiny-llama")
        assert again.fingerprint == view.fingerprint


@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_every_byte_of_a_repaired_model_is_counted(name, dtype) -> None:
    view = repaired(tiny_llm(name, dtype=dtype))
    memory, request = MemoryModel(view), Request(2, 8, 1)
    wide = view.adapter.hidden_size
    assert view.facts.stub_bytes == tuple(dtype.itemsize * wide * (2 * rank + 1) for rank in RANKS)
    for mask in [Plan(), *MASKS.values(), *map(Plan.removing, range(NUM_BLOCKS))]:
        parts = memory.breakdown(mask, request)
        with view.masked(mask):
            state = view.model.state_dict(keep_vars=True)
        held = {t.data_ptr() or id(t): t.nbytes for t in state.values()}
        stubs = sum(t.nbytes for key, t in state.items() if ".stub." in key)
        assert parts.stubs == stubs == sum(view.facts.stub_bytes[block] for block in mask.removed)
        assert parts.weights + parts.embeddings + parts.stubs == sum(held.values())
        assert parts.peak == sum(held.values()) + parts.kv_cache + parts.workspace


# Streamed models


@pytest.fixture
def streamed(lonely, tmp_path):
    folder = saved(tmp_path / "m", dtype=torch.float32)
    return stream_llm(folder, device="cpu", dtype="float32", max_memory_bytes=2**20)


def test_stubs_reduce_the_free_bytes_of_a_streamed_model(streamed) -> None:
    before = streamed.spare_bytes
    view = repaired(streamed)
    assert view.spare_bytes == before - sum(view.facts.stub_bytes) < before
    assert streamed.spare_bytes == before


@EVERY_MASK
def test_a_streamed_view_is_the_view_in_memory(streamed, mask: Plan) -> None:
    view, whole = repaired(streamed), repaired(tiny_llm())
    with view.masked(mask), whole.masked(mask):
        assert torch.equal(logits(view), logits(whole))


def test_a_view_keeps_its_streamed_model_alive(lonely, tmp_path) -> None:
    # Experts are merged into files that go with the model.
    folder = saved(tmp_path / "m", "mixtral", torch.float32)
    llm = stream_llm(folder, device="cpu", dtype="float32", max_memory_bytes=2**20)
    expected = logits(llm)
    view = copy.copy(repaired(repaired(llm), seed=1))
    del llm
    gc.collect()
    assert list(lonely.glob("converted-*/*"))
    assert torch.equal(logits(view), expected)
    del view
    gc.collect()
    assert not list(lonely.glob("converted-*"))
