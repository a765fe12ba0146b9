import gc
import multiprocessing
from pathlib import Path

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file, save_file

from rap_env.errors import (
    InvalidRequestError,
    UnsupportedModelError,
)
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.files.streamed import StreamedLLM, stream_llm
from rap_env.plan import Plan
from tests.models.states import saved
from tests.tiny import each_family, tiny_llm, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 33, 7], [8, 4, 12, 51]])
MASKS = (Plan(), Plan.removing("layer00.attn"), Plan.removing("layer00.ffn", "layer01.attn"))
ENOUGH = 2**20


@pytest.fixture
def folder(lonely: Path, tmp_path: Path) -> Path:
    """A model folder as transformers saves it."""
    return saved(tmp_path / "tiny", "llama_tied", torch.float32)


def stream(folder: Path, dtype: str = "float32", cap: int = ENOUGH) -> StreamedLLM:
    return stream_llm(folder, device="cpu", dtype=dtype, max_memory_bytes=cap)


def layers_in_memory(llm: StreamedLLM) -> list[int]:
    layers = enumerate(llm.adapter.layers(llm.model))
    return [n for n, layer in layers if any(not p.is_meta for p in layer.parameters())]


@each_family("family", dtype=["float32", "bfloat16"])
def test_it_is_the_model_that_would_be_loaded(family, dtype, lonely, tmp_path) -> None:
    saved(tmp_path / "m", family, torch.float32)
    whole = load_llm(tmp_path / "m", device="cpu", dtype=dtype)
    streamed = stream(tmp_path / "m", dtype)
    assert layers_in_memory(streamed) == []
    assert streamed.facts == whole.facts  # the fingerprint too
    assert streamed.pruned == whole.pruned == Plan()
    for mask in MASKS:
        with torch.no_grad(), whole.masked(mask), streamed.masked(mask):
            assert torch.equal(streamed.model(IDS).logits, whole.model(IDS).logits), mask
        assert layers_in_memory(streamed) == []


def test_only_blocks_that_are_kept_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, names = stream(folder), []
    read = OffloadedWeightsLoader.__getitem__

    def noted(weights: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        names.append(name)
        return read(weights, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noted)
    with torch.no_grad(), llm.masked(Plan.removing("layer00.attn", "layer00.ffn", "layer01.ffn")):
        llm.model(IDS)
    assert {tuple(name.split(".")[2:4]) for name in names} == {
        ("1", "input_layernorm"),
        ("1", "self_attn"),
    }


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "mixtral"])
def test_generation(family: str, lonely: Path, tmp_path: Path) -> None:
    saved(tmp_path / "m", family, torch.float32)
    llm = stream(tmp_path / "m")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = load_llm(tmp_path / "m", device="cpu", dtype="float32").generate(IDS, **settings)
    assert torch.equal(llm.generate(IDS, **settings), expected)


def test_weights_in_several_files(lonely: Path, tmp_path: Path) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path / "m", max_shard_size=4096)
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert stream(tmp_path / "m").fingerprint == tiny_llm("llama_tied").fingerprint


def test_a_tied_head_is_one_tensor_even_if_the_file_has_it_twice(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for twice in (False, True):
        if twice:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        llm = stream(folder)
        assert llm.model.lm_head.weight is llm.model.model.embed_tokens.weight
        assert llm.facts == load_llm(folder, device="cpu", dtype="float32").facts


def test_converted_tensors_are_kept_only_as_long_as_the_model(lonely: Path, tmp_path: Path) -> None:
    llm = stream(saved(tmp_path / "m", "mixtral", torch.float32))
    assert list(lonely.glob("converted-*/*experts*"))
    del llm
    gc.collect()
    assert not list(lonely.glob("converted-*"))


def test_spare_bytes_are_the_cap_less_base_and_one_layer(folder: Path) -> None:
    llm = stream(folder)
    layer = sum(llm.facts.block_param_bytes[:2])
    assert llm.spare_bytes == ENOUGH - llm.facts.base_bytes - layer
    with pytest.raises(InvalidRequestError, match=rf"one layer take {ENOUGH - llm.spare_bytes:,}"):
        stream(folder, cap=ENOUGH - llm.spare_bytes)
    stream(folder, cap=ENOUGH - llm.spare_bytes + 1)


def test_reading_in_another_dtype_counts(folder: Path) -> None:
    layer = sum(tiny_llm("llama_tied").facts.block_param_bytes[:2])
    base = tiny_llm("llama_tied").facts.base_bytes
    largest_in_file = 16 * 24 * 4
    assert ENOUGH - stream(folder, "bfloat16").spare_bytes == (base + layer) // 2 + largest_in_file


# Errors


def test_a_pruned_checkpoint_is_rejected(lonely: Path, tmp_path: Path) -> None:
    save_pruned(tiny_llm(tokenizer=tiny_tokenizer()), Plan.removing(0), tmp_path / "pruned")
    with pytest.raises(UnsupportedModelError, match=r"pruned checkpoint.* use load_llm\(\)"):
        stream(tmp_path / "pruned")


def test_a_fork_does_not_delete_its_parents_converted_tensors(lonely: Path, tmp_path: Path) -> None:
    llm = stream(saved(tmp_path / "m", "mixtral", torch.float32))

    def forget() -> None:
        nonlocal llm
        del llm
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=forget)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert list(lonely.glob("converted-*/*experts*"))
    with torch.no_grad():
        llm.model(IDS)
