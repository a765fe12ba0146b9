"""A pruned checkpoint keeps the stubs in the places of its removed blocks."""

import pytest
import torch

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.models.files.pruned_checkpoint import PRUNED_FILE, load_pruned, save_pruned
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.files.test_pruned_checkpoint import EVERYTHING, MASK, logits, tensor_bytes
from tests.models.stubs import RANKS, random_stubs, repaired
from tests.tiny import each_family, padded_batch, tiny_llm

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_family(
    "name",
    mask={"two blocks": MASK, "everything": EVERYTHING},
    dtype=[torch.float32, torch.bfloat16],
)
def test_stubs_are_saved_and_loaded_along(name: str, mask: Plan, dtype, tmp_path) -> None:
    view = repaired(tiny_llm(name, dtype=dtype))
    loaded = load_pruned(save_pruned(view, mask, tmp_path / "pruned"))
    assert view.mask == Plan()
    with view.masked(mask):
        assert torch.equal(logits(loaded.model), logits(view.model))
        ours, theirs = loaded.model.state_dict(), view.model.state_dict()
    assert set(ours) == set(theirs)
    assert {key: t.dtype for key, t in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    assert sum(".stub." in key for key in ours) == 3 * len(mask.removed)
    parts = MemoryModel(view).breakdown(mask, Request(2, 8, 1))
    assert tensor_bytes(tmp_path / "pruned") == parts.weights + parts.embeddings + parts.stubs
    assert loaded.pruned == mask
    for block, stub_bytes in zip(loaded.blocks, view.facts.stub_bytes, strict=True):
        assert (block.param_bytes == stub_bytes) == (block.index in mask.removed)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt2", "opt", "mixtral"])
def test_a_model_loaded_with_stubs_generates_as_the_masked_one(name: str, dtype, tmp_path) -> None:
    view = repaired(tiny_llm(name, dtype=dtype))
    ask = {**padded_batch(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for mask in (MASK, EVERYTHING):
        loaded = load_pruned(save_pruned(view, mask, tmp_path / "pruned"))
        found = loaded.generate(**ask, use_cache=True)
        assert torch.equal(found, loaded.generate(**ask, use_cache=False))
        with view.masked(mask):
            assert torch.equal(found, view.generate(**ask))


def test_the_loaded_stubs_are_part_of_the_model(tmp_path) -> None:
    llm = tiny_llm()
    views = [repaired(llm), repaired(llm, seed=1), llm]
    loaded = [load_pruned(save_pruned(v, MASK, tmp_path / str(n))) for n, v in enumerate(views)]
    assert len({one.fingerprint for one in loaded}) == 3
    request = Request(2, 16, 1)
    ours = MemoryModel(loaded[0]).breakdown(Plan(), request)
    theirs = MemoryModel(views[0]).breakdown(MASK, request)
    assert ours.peak == theirs.peak
    assert ours.weights == theirs.weights + theirs.stubs


def test_a_mask_with_a_missing_block_removes_its_stub(tmp_path) -> None:
    llm = tiny_llm()
    loaded = load_pruned(save_pruned(repaired(llm), MASK, tmp_path / "pruned"))
    before = logits(loaded.model)
    with loaded.masked(MASK), llm.masked(MASK):
        assert torch.equal(logits(loaded.model), logits(llm.model))
    assert torch.equal(logits(loaded.model), before)


def test_a_loaded_model_is_saved_again_with_its_stubs(tmp_path) -> None:
    llm = tiny_llm()
    stubs = random_stubs(llm)
    view = llm.repaired(stubs, "random")
    loaded = load_pruned(save_pruned(view, MASK, tmp_path / "pruned"))
    again = load_pruned(save_pruned(loaded, Plan.removing(1), tmp_path / "again"))
    with view.masked(MASK.without(1), bare=Plan.removing(1)):
        assert torch.equal(logits(again.model), logits(view.model))
    assert again.pruned == MASK.without(1)
    more = load_pruned(
        save_pruned(loaded.repaired({1: stubs[1]}, "one"), Plan.removing(1), tmp_path / "more")
    )
    with view.masked(MASK.without(1)):
        assert torch.equal(logits(more.model), logits(view.model))


def test_a_repaired_view_under_the_empty_mask_saves_the_dense_model(tmp_path) -> None:
    view = repaired(tiny_llm())
    loaded = load_pruned(save_pruned(view, Plan(), tmp_path / "pruned"))
    assert loaded.fingerprint == view.fingerprint


def test_ranks_are_saved_and_older_files_without_them_load(tmp_path) -> None:
    view = repaired(tiny_llm())
    body = load_artifact(
        save_pruned(view, MASK, tmp_path / "new") / PRUNED_FILE, "pruned-checkpoint", 1
    )
    assert body["stub_ranks"] == {"layer00.attn": RANKS[0], "layer01.ffn": RANKS[3]}
    folder = save_pruned(tiny_llm(), MASK, tmp_path / "old")
    body = load_artifact(folder / PRUNED_FILE, "pruned-checkpoint", 1)
    assert body.pop("stub_ranks") == {}
    save_artifact(folder / PRUNED_FILE, "pruned-checkpoint", 1, body)
    with view.masked(MASK, bare=MASK):
        assert torch.equal(logits(load_pruned(folder).model), logits(view.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"unexpected tensors model\.layers\.0\.self_attn\.stub\.down"),
        ({"layer00.attn": 5, "layer01.ffn": 3}, "do not fit its config"),
    ],
)
def test_other_ranks_than_those_saved_are_an_error(change, message: str, tmp_path) -> None:
    folder = save_pruned(repaired(tiny_llm()), MASK, tmp_path / "pruned")
    body = load_artifact(folder / PRUNED_FILE, "pruned-checkpoint", 1)
    save_artifact(folder / PRUNED_FILE, "pruned-checkpoint", 1, {**body, "stub_ranks": change})
    with pytest.raises(ArtifactError, match=message):
        load_pruned(folder)
