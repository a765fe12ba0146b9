"""Bytes of stubs, and stubs on a model that is streamed under a cap."""

import copy
import gc

import pytest
import torch

from rap_env.memory import MemoryModel
from rap_env.models.files.streamed import stream_llm
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.live.test_elastic import EVERY_MASK, MASKS, NUM_BLOCKS, logits
from tests.models.stubs import RANKS, repaired
from tests.tiny import each_family, padded_batch, tiny_llm, tiny_model, tiny_tokenizer


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


def test_stub_bytes_are_added_and_the_rest_is_unchanged() -> None:
    llm = tiny_llm()
    plain, ours = MemoryModel(llm), MemoryModel(repaired(llm))
    request = Request(2, 8, 1)
    assert ours.peak_bytes(Plan(), request) == plain.peak_bytes(Plan(), request)
    dearer = [
        ours.peak_bytes(Plan.removing(b), request) - plain.peak_bytes(Plan.removing(b), request)
        for b in range(NUM_BLOCKS)
    ]
    assert dearer == list(ours.facts.stub_bytes)


# Streamed models


@pytest.fixture
def streamed(lonely, tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return stream_llm(tmp_path / "m", device="cpu", dtype="float32", max_memory_bytes=2**20)


def test_stubs_reduce_the_free_bytes_of_a_streamed_model(streamed) -> None:
    before = streamed.spare_bytes
    view = repaired(streamed)
    assert view.spare_bytes == before - sum(view.facts.stub_bytes) < before
    assert streamed.spare_bytes == before


@EVERY_MASK
def test_a_streamed_view_is_the_view_in_memory(streamed, mask: Plan) -> None:
    view, whole = repaired(streamed), repaired(tiny_llm())
    with view.masked(mask), whole.masked(mask):
        assert torch.equal(logits(view.model), logits(whole.model))


def test_a_view_keeps_its_streamed_model_alive(lonely, tmp_path) -> None:
    # Experts are merged into files that go with the model.
    tiny_model("mixtral").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    llm = stream_llm(tmp_path / "m", device="cpu", dtype="float32", max_memory_bytes=2**20)
    with torch.no_grad():
        expected = llm.model(padded_batch()["input_ids"]).logits
    view = copy.copy(repaired(repaired(llm), seed=1))
    del llm
    gc.collect()
    assert list(lonely.glob("converted-*/*"))
    with torch.no_grad():
        assert torch.equal(view.model(padded_batch()["input_ids"]).logits, expected)
    del view
    gc.collect()
    assert not list(lonely.glob("converted-*"))
