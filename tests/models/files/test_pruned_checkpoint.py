"""Pruned checkpoints, read by this package and by transformers with the code in their folder."""

import ast
import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ArtifactError, StorageFullError, UnknownNameError, UnsupportedModelError
from rap_env.memory import MemoryModel
from rap_env.models.caches.attention import attention_name
from rap_env.models.files import pruned_checkpoint
from rap_env.models.files.pruned_checkpoint import (
    PRUNED_FILE,
    load_pruned,
    save_pruned,
    vllm_entries,
)
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.states import logits
from tests.tiny import FAMILIES, LAYERS, each_family, padded_batch, tiny_llm, tiny_tokenizer

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
    with llm.applied(mask):
        assert torch.equal(logits(loaded), logits(llm))
        assert type(loaded.model) is type(llm.model)
        ours, theirs = loaded.model.state_dict(), llm.model.state_dict()
    assert {key: t.dtype for key, t in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    parts = MemoryModel(llm).breakdown(mask, Request(2, 8, 1))
    assert tensor_bytes(tmp_path / "pruned") == parts.weights + parts.embeddings
    for block, size in enumerate(loaded.facts.block_param_bytes):
        assert (size == 0) == (block in mask.removed)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_the_loaded_model_can_be_masked_further(name: str, tmp_path) -> None:
    llm = tiny_llm(name)
    loaded = load_pruned(save_pruned(llm, MASK, tmp_path / "pruned"))
    more = Plan.removing(0, 1)
    with llm.applied(MASK.without(*more.removed)), loaded.applied(more):
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
    with llm.applied(MASK):
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


def test_what_another_process_writes_stays_and_what_a_killed_one_left_goes(saved, tmp_path):
    theirs, left = (tmp_path / f".pruned.part-{pid}" for pid in (os.getppid(), 2**30))
    theirs.mkdir()
    left.mkdir()
    save_pruned(tiny_llm(), EVERYTHING, saved)
    assert {*tmp_path.iterdir()} == {saved, theirs}


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


# Their code


def opened(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


@pytest.mark.engine_feature("transformers", "Families", "all")
@pytest.mark.engine_feature("transformers", "Removed blocks", "any")
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_opens_the_masked_model(name: str, tmp_path) -> None:
    llm = tiny_llm(name)
    mask = Plan(EVERYTHING.removed - {2})  # the cache of layer 0 alone is gone
    model = opened(save_pruned(llm, mask, tmp_path / "pruned"))
    ask = {**padded_batch(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, without = model.generate(**ask), model.generate(**ask, use_cache=False)
    with llm.applied(mask):
        assert torch.equal(logits(model), logits(llm))
        assert torch.equal(cached, llm.generate(**ask))
    assert torch.equal(cached, without)


def test_the_code_needs_neither_this_package_nor_more_than_torch(tmp_path) -> None:
    folder = save_pruned(tiny_llm(), MASK, tmp_path / "pruned")
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
    assert imported == {"__future__", "collections", "torch", "transformers", "typing"}
    block = opened(folder).model.layers[0].self_attn
    assert type(block).__module__.startswith("transformers_modules.")


def test_what_transformers_saves_again_opens_again(tmp_path) -> None:
    model = opened(save_pruned(tiny_llm(), MASK, tmp_path / "pruned"))
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(model.state_dict())
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))


def test_without_trust_no_code_is_run_and_no_model_opened(tmp_path) -> None:
    folder = save_pruned(tiny_llm(tokenizer=tiny_tokenizer()), MASK, tmp_path / "pruned")
    (folder / "modeling_rap_pruned.py").write_text("raise RuntimeError('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert AutoTokenizer.from_pretrained(folder)("so").input_ids
    assert load_pruned(folder).pruned == MASK


@pytest.mark.engine_feature("vLLM", "Families", "Llama, Mistral, Qwen2")
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2"])
def test_vllm_reads_which_blocks_are_left_out(name: str, tmp_path) -> None:
    mask = Plan.removing(1, 2)
    folder = save_pruned(tiny_llm(name), mask, tmp_path / "pruned")
    for _ in range(2):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        first, second = config.block_configs
        assert (first.attention.no_op, first.ffn.no_op) == (False, True)
        assert (second.attention.no_op, second.ffn.no_op) == (True, False)
        # Attributes that are not there: vLLM reads the size, since no multiplier is stated.
        assert not hasattr(second.ffn, "ffn_mult")
        assert second.ffn.intermediate_size == config.intermediate_size
        kv_heads = config.num_attention_heads // first.attention.n_heads_in_group
        assert kv_heads == config.num_key_value_heads
        assert getattr(config, "qkv_bias", False) == (name == "qwen2")
        config.save_pretrained(folder)  # what transformers writes again holds it, too
    entries = json.loads((folder / "config.json").read_text())
    assert entries["architectures"] == ["DeciLMForCausalLM"]
    kept = [n for n in load_file(folder / "model.safetensors") if n.startswith("model.layers")]
    parts = {(int(n.split(".")[2]), n.split(".")[3]) for n in kept}
    assert parts == {
        (0, "self_attn"), (0, "input_layernorm"), (1, "mlp"), (1, "post_attention_layernorm")
    }  # fmt: skip


@pytest.mark.engine_feature("vLLM", "Removed blocks", "any, if the first kept block is attention")
@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("gemma2", MASK, "gemma2 is none; known are llama, mistral, qwen2"),
        ("mistral_sliding", Plan.removing(1), "no sliding window, and this mistral has one"),
        ("llama", Plan.removing(0), "cannot start with a feed-forward block"),
        ("llama", EVERYTHING, "cannot start with a feed-forward block"),
    ],
)
def test_what_vllm_cannot_serve_is_not_offered_to_it(name, mask, words, tmp_path) -> None:
    llm = tiny_llm(name)
    with pytest.raises(UnsupportedModelError, match=words):
        vllm_entries(llm.adapter, mask)
    folder = save_pruned(llm, mask, tmp_path / "pruned")
    entries = json.loads((folder / "config.json").read_text())
    assert entries["architectures"] == ["RapPrunedForCausalLM"]
    assert "block_configs" not in entries
    assert vllm_entries(tiny_llm().adapter, Plan.removing(0, 1))  # a layer as a whole
