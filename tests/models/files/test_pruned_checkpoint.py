"""Pruned checkpoints."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import (
    ArtifactError,
    StorageFullError,
    UnknownNameError,
)
from rap_env.memory import MemoryModel
from rap_env.models.caches.attention import attention_name
from rap_env.models.files import pruned_checkpoint
from rap_env.models.files.pruned_checkpoint import PRUNED_FILE, load_pruned, save_pruned
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.generation import token_by_token
from tests.models.states import logits
from tests.tiny import LAYERS, each_family, padded_batch, tiny_llm, tiny_tokenizer

MASK = Plan.removing("layer00.attn", "layer01.ffn")
EVERYTHING = Plan.removing(*range(2 * LAYERS))


def tensor_bytes(folder) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    return total


@pytest.fixture
def saved(tmp_path):
    return save_pruned(tiny_llm(), MASK, tmp_path / "pruned")


@each_family(
    "name",
    mask={"two blocks": MASK, "everything": EVERYTHING},
    dtype=[torch.float32, torch.bfloat16],
)
def test_the_loaded_model_is_the_masked_one(name, mask, dtype, tmp_path) -> None:
    llm = tiny_llm(name, dtype=dtype)
    loaded = load_pruned(save_pruned(llm, mask, tmp_path / "pruned"))
    assert llm.plan == loaded.plan == Plan()
    assert loaded.pruned == mask
    with llm.masked(mask):
        assert torch.equal(logits(loaded), logits(llm))
        assert type(loaded.model) is type(llm.model)
        ours, theirs = loaded.model.state_dict(), llm.model.state_dict()
    assert {key: t.dtype for key, t in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    parts = MemoryModel(llm).breakdown(mask, Request(2, 8, 1))
    assert tensor_bytes(tmp_path / "pruned") == parts.weights + parts.embeddings
    for block, size in enumerate(loaded.facts.block_param_bytes):
        assert (size == 0) == (block in mask.removed)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_the_loaded_model_generates_and_can_be_masked_further(name: str, tmp_path) -> None:
    llm = tiny_llm(name)
    loaded = load_pruned(save_pruned(llm, MASK, tmp_path / "pruned"))
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    stepped = token_by_token(loaded.model, **batch, prompt=4)
    torch.testing.assert_close(stepped[seen], logits(loaded)[seen], rtol=1e-4, atol=1e-4)
    more = Plan.removing(0, 1)
    with llm.masked(MASK.without(*more.removed)), loaded.masked(more):
        assert torch.equal(logits(loaded), logits(llm))
    again = load_pruned(save_pruned(loaded, more, tmp_path / "more"))
    assert again.pruned == MASK.without(*more.removed)


def test_the_empty_mask_saves_the_whole_model(tmp_path) -> None:
    llm = tiny_llm("llama_tied", dtype=torch.bfloat16)
    loaded = load_pruned(save_pruned(llm, Plan(), tmp_path / "pruned"))
    assert loaded.fingerprint == llm.fingerprint
    assert loaded.dtype == torch.bfloat16


def test_the_tokenizer_is_saved_along(tmp_path) -> None:
    llm = tiny_llm(tokenizer=tiny_tokenizer())
    folder = save_pruned(llm, MASK, tmp_path / "pruned")
    loaded, text = load_pruned(folder), "so it goes"
    for tokenizer in (loaded.tokenizer, AutoTokenizer.from_pretrained(folder)):
        assert tokenizer(text).input_ids == llm.tokenizer(text).input_ids
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.name == "tiny-llama"
    assert load_pruned(save_pruned(tiny_llm(), MASK, tmp_path / "without")).tokenizer is None


def test_the_attention_implementation_is_kept(tmp_path) -> None:
    llm = tiny_llm()
    llm.model.set_attn_implementation("eager")
    loaded = load_pruned(save_pruned(llm, MASK, tmp_path / "pruned"))
    assert attention_name(loaded.model) == "eager"
    with llm.masked(MASK):
        assert torch.equal(logits(loaded), logits(llm))


def test_a_tensor_of_a_removed_block_is_an_error(saved) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {**load_file(saved / "model.safetensors"), name: torch.zeros(16, 16)}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    body = load_artifact(saved / PRUNED_FILE, "pruned-checkpoint", 1)
    body["files"] = pruned_checkpoint._checksums(saved)  # as if they were saved so
    save_artifact(saved / PRUNED_FILE, "pruned-checkpoint", 1, body)
    with pytest.raises(ArtifactError, match=r"unexpected tensors model\.layers\.0\.self_attn"):
        load_pruned(saved)


def test_another_mask_than_the_one_saved_is_an_error(saved) -> None:
    path = saved / PRUNED_FILE
    path.write_text(path.read_text().replace("layer01.ffn", "layer00.ffn"))
    with pytest.raises(ArtifactError, match=r"was altered after it was written"):
        load_pruned(saved)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ArtifactError, match="is truncated"):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_cut_or_lost_file_is_an_error(saved, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="altered, truncated or removed"):
        load_pruned(saved)
    path.unlink()
    with pytest.raises(ArtifactError, match="altered, truncated or removed"):
        load_pruned(saved)


def test_a_folder_without_a_pruned_checkpoint_is_not_found(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{PRUNED_FILE}.*rap prune"):
        load_pruned(tmp_path)


def test_a_block_that_the_model_lacks_is_rejected_and_nothing_is_written(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="layer07"):
        save_pruned(tiny_llm(), Plan.removing("layer07.ffn"), tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_an_older_checkpoint_is_replaced_and_other_folders_are_not_modified(saved, tmp_path):
    save_pruned(tiny_llm(), EVERYTHING, saved)
    assert load_pruned(saved).pruned == EVERYTHING
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="has content that is no pruned checkpoint"):
        save_pruned(tiny_llm(), MASK, tmp_path / "other")
    with pytest.raises(ArtifactError, match="is a file, not a folder"):
        save_pruned(tiny_llm(), MASK, tmp_path / "other" / "thesis.txt")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_others_may_read_what_the_umask_lets_them(saved, tmp_path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").touch()
    for path in saved, *saved.iterdir():
        other = plain if path.is_dir() else plain / "file"
        assert path.stat().st_mode == other.stat().st_mode, path


def test_a_full_disk_leaves_the_older_checkpoint(saved, tmp_path, monkeypatch):
    llm = tiny_llm()

    def save(folder, **_options) -> None:
        (folder / "model.safetensors").write_bytes(b"half of")
        # what safetensors raises, which is no OSError
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(llm.model, "save_pretrained", save)
    with pytest.raises(StorageFullError, match="No space left while writing"):
        save_pruned(llm, EVERYTHING, saved)
    assert llm.plan == Plan()
    assert load_pruned(saved).pruned == MASK
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_checkpoints_of_earlier_versions_are_read_unless_they_have_stubs(saved) -> None:
    body = load_artifact(saved / PRUNED_FILE, "pruned-checkpoint", 1)
    save_artifact(saved / PRUNED_FILE, "pruned-checkpoint", 1, {**body, "stub_ranks": {}})
    assert load_pruned(saved).pruned == MASK
    body |= {"stub_ranks": {"layer00.attn": 4}}
    save_artifact(saved / PRUNED_FILE, "pruned-checkpoint", 1, body)
    with pytest.raises(ArtifactError, match="pruned was measured or made with stubs"):
        load_pruned(saved)
