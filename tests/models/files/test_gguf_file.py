import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.files import gguf_conversion
from rap_env.models.files.gguf_source import converted_gguf, gguf_folder_name
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import file_sha256
from tests.models.states import damage_file
from tests.models.tiny_gguf import TEMPLATE, TOKENS, write_tiny_gguf

fork = multiprocessing.get_context("fork")
IDS = torch.tensor([[5, 9, 33, 7, 100, 260]])


def test_a_gguf_file_becomes_the_model_that_it_holds(lonely: Path, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    llm = load_llm(tmp_path / "tiny.gguf", device="cpu", dtype="float32", weights="bf16")
    assert llm.name == "tiny"
    assert torch.equal(llm.model(IDS).logits, source(IDS).logits)
    assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight
    assert llm.adapter.max_positions == 64
    folder = converted_gguf(tmp_path / "tiny.gguf")
    with safe_open(folder / "model.safetensors", "pt") as file:  # a tied head is held once
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_tokenizer_is_kept(lonely: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    llm = load_llm(tmp_path / "tiny.gguf", device="cpu")
    tokenizer, generation = llm.tokenizer, llm.model.generation_config
    assert tokenizer.convert_ids_to_tokens(tokenizer("he  1").input_ids) == ["he", "ĠĠ", "1"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == len(TOKENS)
    text = "the  1 Ünïcode 12"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_second_load_converts_nothing(lonely, tmp_path, monkeypatch) -> None:
    for name, seed in (("tiny", 0), ("other", 1)):
        write_tiny_gguf(tmp_path / f"{name}.gguf", seed=seed)
    first = converted_gguf(tmp_path / "tiny.gguf")
    assert converted_gguf(tmp_path / "other.gguf") != first
    monkeypatch.setattr(gguf_conversion, "_write_model", lambda *_: pytest.fail("converted again"))
    (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    assert converted_gguf(tmp_path / "moved.gguf") == first  # by content, not by path


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_conversion_is_made_again(damage, lonely, tmp_path, caplog) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    weights = converted_gguf(tmp_path / "tiny.gguf") / "model.safetensors"
    damage_file(weights, damage)
    llm = load_llm(tmp_path / "tiny.gguf", device="cpu", dtype="float32", weights="bf16")
    assert "is damaged; it is created again" in caplog.text
    assert torch.equal(llm.model(IDS).logits, source(IDS).logits)


def _die_while_converting(path: Path, packed: bool) -> None:
    def half(*arguments: Any) -> None:
        (arguments[-1] / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    gguf_conversion._write_model = half
    converted_gguf(path, packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_a_killed_conversion_is_repaired_by_the_next_call(packed, lonely, tmp_path) -> None:
    path = tmp_path / "tiny.gguf"
    source = write_tiny_gguf(path)
    child = fork.Process(target=_die_while_converting, args=(path, packed))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    models = lonely / "models"
    assert list(models.rglob("half"))
    weights = "native" if packed else "bf16"
    llm = load_llm(path, device="cpu", dtype="float32", weights=weights)
    assert torch.equal(llm.model(IDS).logits, source(IDS).logits)
    assert [path.name for path in models.iterdir() if path.is_dir()] == [
        gguf_folder_name(file_sha256(path), packed=packed)
    ]


def test_a_file_of_another_kind_is_rejected(lonely: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ChecksumError, match=r"text\.gguf is no GGUF file .*magic invalid"):
        load_llm(tmp_path / "text.gguf")


def test_a_file_without_a_tokenizer_is_rejected(lonely: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", leave_out="tokenizer")
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf has no tokenizer that"):
        load_llm(tmp_path / "tiny.gguf")
    assert not list((lonely / "models").glob("gguf-*"))


@pytest.mark.parametrize("weights", ["native", "bf16"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_rejected(kept, weights, lonely, tmp_path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_0", hidden=64, ffn=96)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ChecksumError, match=r"tiny\.gguf is .*damaged .*download it again"):
        load_llm(tmp_path / "tiny.gguf", weights=weights)
    assert not list((lonely / "models").glob("gguf-*"))


def test_a_number_of_entries_beyond_the_end_of_the_file_is_rejected(lonely, tmp_path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_0", hidden=64, ffn=96)
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    key = b"tokenizer.ggml.token_type"
    count = content.index(key) + len(key) + 8  # after the types of the field and of its entries
    content[count : count + 8] = (2**40).to_bytes(8, "little")
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(ChecksumError, match=r"tiny\.gguf is .*damaged .*download it again"):
        load_llm(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("architecture", ["starcoder2", "rwkv6"])
def test_an_unknown_family_is_rejected_before_its_weights_are_read(architecture, lonely, tmp_path):
    write_tiny_gguf(tmp_path / "other.gguf", architecture=architecture)
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*known are .*llama.*To add"):
        load_llm(tmp_path / "other.gguf")
