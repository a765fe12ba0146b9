"""Models whose decoder layers stay in their files."""

from pathlib import Path

import torch

from rap_env.models.files.loading import load_llm
from rap_env.models.files.weight_files import load_offloaded
from tests.models.states import saved
from tests.tiny import each_family, tiny_model

IDS = torch.tensor([[5, 9, 33, 7], [8, 4, 12, 51]])
CPU = torch.device("cpu")


@each_family("family", dtype=["float32", "bfloat16"])
def test_it_computes_what_the_loaded_model_does(family, dtype, lonely, tmp_path) -> None:
    folder = saved(tmp_path / "m", family, torch.float32)
    whole = load_llm(folder, device="cpu", dtype=dtype)
    work = tmp_path / "converted"
    work.mkdir()
    model = load_offloaded(folder, getattr(torch, dtype), CPU, work)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole.model(IDS).logits)
    layers = whole.adapter.layers(model)
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_weights_in_several_files(lonely: Path, tmp_path: Path) -> None:
    model = tiny_model("llama_tied")
    model.save_pretrained(tmp_path / "m", max_shard_size=4096)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    offloaded = load_offloaded(tmp_path / "m", torch.float32, CPU, tmp_path)
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
