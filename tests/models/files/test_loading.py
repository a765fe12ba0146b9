import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import pre_tokenizers

from rap_env.errors import (
    ChecksumError,
    ModelNotAvailableError,
    UnknownNameError,
    UnsupportedModelError,
)  # fmt: skip
from rap_env.models.caches.attention import attention_name
from rap_env.models.files import loading
from rap_env.models.files.loading import load_llm, shared_llm
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.files.weight_files import load_tokenizer
from rap_env.plan import Plan
from tests.models.states import damage_file, saved
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 33]])


@pytest.fixture
def folder(lonely: Path, tmp_path: Path) -> Path:
    """A model folder as transformers saves it."""
    return saved(tmp_path / "tiny-llama", "llama_tied", torch.float32)


@pytest.fixture(autouse=True)
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_shared", {})


def test_a_folder_loads_the_saved_model(folder: Path) -> None:
    llm = load_llm(folder, device="cpu", dtype="float32")
    assert llm.name == "tiny-llama"
    assert torch.equal(llm.model(IDS).logits, tiny_model("llama_tied")(IDS).logits)
    assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight
    assert not llm.model.training  # it is ready for inference
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())
    assert attention_name(llm.model) == "sdpa"
    assert llm.model.config.use_cache
    assert llm.tokenizer.padding_side == "left"
    assert llm.tokenizer.decode(llm.tokenizer("Hello, world.").input_ids) == "Hello, world."


def test_a_relative_path_and_a_home_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("tiny-llama", "./tiny-llama", "~/tiny-llama", "tiny-llama/"):
        assert load_llm(name, device="cpu").name == "tiny-llama"


def test_a_tokenizer_without_padding_gets_its_end_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_llm(folder, device="cpu").tokenizer.pad_token == "</s>"


def test_a_pruned_checkpoint_loads_as_a_pruned_model(lonely: Path, tmp_path: Path) -> None:
    mask = Plan.removing("layer00.attn")
    save_pruned(tiny_llm(tokenizer=tiny_tokenizer()), mask, tmp_path / "pruned")
    llm = load_llm(tmp_path / "pruned", device="cpu")
    assert llm.pruned == mask
    assert llm.dtype is torch.float32
    with pytest.raises(UnsupportedModelError, match=r"dtype torch\.float32, not torch\.bfloat16"):
        load_llm(tmp_path / "pruned", device="cpu", dtype="bfloat16")


# Errors


@pytest.mark.parametrize("name", ["smollm-135m", "nothing", ""])
def test_an_unknown_alias(name: str, lonely: Path) -> None:
    with pytest.raises(UnknownNameError, match=f"model '{name}'; known are .*'smollm2-135m'"):
        load_llm(name)


@pytest.mark.parametrize("name", ["./none", "~/none", "/none/at/all", "a/b/c", "none.gguf"])
def test_a_missing_path_is_an_error(name: str, lonely: Path) -> None:
    with pytest.raises(ModelNotAvailableError, match="no model folder or GGUF file"):
        load_llm(name)


@pytest.mark.parametrize("model_type", ["bert", "never-heard-of", None])
def test_an_unknown_family_is_rejected_before_its_weights(model_type, folder, monkeypatch) -> None:
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    edit_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' are not known"):
        load_llm(folder)


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ModelNotAvailableError, "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ChecksumError, "config.json is truncated"),
        (lambda f: (f / "config.json").write_text("[]"), ChecksumError, "config.json is truncated"),
        (lambda f: edit_config(f, hidden_size="wide"), UnsupportedModelError, "cannot read"),
        (lambda f: edit_config(f, num_hidden_layers=3), UnsupportedModelError, "lacks .* tensors"),
        (lambda f: edit_config(f, intermediate_size=32), UnsupportedModelError, "do not fit"),
        (lambda f: damage_file(f / "model.safetensors", "cut"), ChecksumError, "truncated"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            ModelNotAvailableError,
            "not all its weight",
        ),
        (without_tokenizer, ModelNotAvailableError, "has no tokenizer"),
    ],
)
def test_a_folder_that_is_not_whole_is_an_error(damage, error, words, folder) -> None:
    damage(folder)
    with pytest.raises(error, match=words):
        load_llm(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# One model a process


def test_equal_arguments_share_one_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    llm = shared_llm(folder)
    assert shared_llm("tiny-llama", device=str(llm.device)) is llm  # what "auto" stands for
    assert shared_llm(folder, weights="bf16") is not llm
    assert shared_llm(str(folder), dtype="float16") is not llm


def _use_in_child(folder: Path) -> None:
    loading.load_llm = lambda *_, **__: os._exit(3)  # type: ignore[assignment]
    llm = shared_llm(folder, device="cpu", dtype="float32")
    same = torch.equal(llm.model(IDS).logits, tiny_model("llama_tied")(IDS).logits)
    os._exit(0 if same else 4)


def test_a_forked_process_uses_its_parents_model(folder: Path) -> None:
    shared_llm(folder, device="cpu", dtype="float32")
    with loading._shared_lock:  # as if another thread were loading while the process forks
        child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(folder,))
        child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_tokenizer_that_is_whole_in_json_is_the_one_of_transformers(family, tmp_path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_end|>", *alphabet, "he", "Ã©"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = tf.Qwen2Tokenizer(vocabulary, [("h", "e"), ("Ã", "©")], eos_token="<|im_end|>")
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(tmp_path)
    stated = {"qwen2": "Qwen2Tokenizer", "llama": "TokenizersBackend"}[family]
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class=stated)
    change_json(tmp_path / "tokenizer.json", normalizer=None)  # as those of GGUF files are
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    whole, slow = load_tokenizer(tmp_path), tf.AutoTokenizer.from_pretrained(tmp_path)
    text = "he sees e\u0301 and \u00e9<|im_end|>\n\n 12  <|endoftext|>"
    assert type(whole) is tf.TokenizersBackend
    assert whole(text).data == slow(text).data
    assert whole.decode(whole(text).input_ids, skip_special_tokens=True) == slow.decode(
        slow(text).input_ids, skip_special_tokens=True
    )
    for name in ("special_tokens_map", "all_special_ids", "added_tokens_decoder", "chat_template"):
        assert getattr(whole, name) == getattr(slow, name)
    assert whole.get_vocab() == slow.get_vocab()


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
