"""Weights of removed blocks really leave memory, and are restored bit for bit."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from rap_env.errors import (
    ChecksumError,
    ModelNotAvailableError,
    UnknownNameError,
    UnsupportedModelError,
)
from rap_env.models.device import return_freed_memory
from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.tensors import weights_of
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.serving.served_model import load_served_model
from rap_env.serving.settings import ServerSettings
from tests.models.states import apply_to, damage_file, logits, opened, saved, weights_hash
from tests.models.tiny_gguf import write_tiny_gguf
from tests.tiny import LAYERS, tiny_llm


def test_the_models_own_files_serve_and_nothing_is_written(tmp_path) -> None:
    folder = saved(tmp_path)
    for residency in ("offload", "drop"):
        for dtype in (torch.bfloat16, torch.float32):  # wider than in the files
            llm = opened(folder, dtype)
            before = weights_hash(llm.model)
            llm.set_residency(residency)
            llm.apply(Plan.removing(*range(2 * LAYERS)))
            llm.apply(Plan())
            assert weights_hash(llm.model) == before
    assert not (cache_dir() / "offloaded").exists()


@pytest.mark.parametrize("residency", ["offload", "drop"])
def test_weights_as_stored_are_neither_copied_nor_hashed(residency, tmp_path, monkeypatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, kind="Q8_0", hidden=64, ffn=96)
    llm = load_llm(path, device="cpu", dtype="float32", lean=True)
    before = weights_hash(llm.model)
    places = [tensor.data_ptr() for _, tensor in weights_of(llm.model)]
    llm.fingerprint  # noqa: B018  it is remembered
    monkeypatch.setattr("rap_env.models.weights.residency._digest", None)
    llm.set_residency(residency)
    assert [tensor.data_ptr() for _, tensor in weights_of(llm.model)] == places
    held = llm.held_bytes.weights
    llm.apply(Plan.removing(*range(llm.num_blocks)))
    assert llm.held_bytes.weights < held
    llm.apply(Plan())
    assert weights_hash(llm.model) == before
    assert not (cache_dir() / "offloaded").exists()


def test_a_model_without_files_writes_them_once() -> None:
    written = []
    for _ in range(2):
        tiny_llm().set_residency("offload")
        files = sorted(cache_dir().rglob("*.safetensors"))
        written.append([(file.name, file.stat().st_mtime_ns) for file in files])
    assert len(written[0]) == 2 * LAYERS
    assert written[0] == written[1]


def test_files_with_other_values_are_not_used(tmp_path) -> None:
    llm = opened(saved(tmp_path))
    with torch.no_grad():
        llm.model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    before = weights_hash(llm.model)
    with pytest.raises(UnsupportedModelError, match="hold other values than the model"):
        llm.set_residency("drop")
    assert llm.residency == "resident"
    llm.set_residency("offload")
    llm.apply(Plan.removing(*range(2 * LAYERS)))
    llm.apply(Plan())
    assert weights_hash(llm.model) == before


def test_drop_needs_model_files() -> None:
    llm = tiny_llm()
    with pytest.raises(UnsupportedModelError, match="residency='drop' reads weights again"):
        llm.set_residency("drop")
    with pytest.raises(UnknownNameError, match="Did you mean 'offload'"):
        llm.set_residency("offlad")


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_plan_stays_whole_while_a_block_cannot_be_read(tmp_path, damage) -> None:
    folder = saved(tmp_path)
    llm, plain = opened(folder), tiny_llm(dtype=torch.bfloat16)  # in memory, not mapped
    llm.set_residency("drop")
    apply_to(Plan.removing(1, 2), llm, plain)
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    damage_file(file, damage)
    for other in (Plan(), Plan.removing(0, 2)):
        with pytest.raises((ModelNotAvailableError, ChecksumError), match=re.escape(str(file))):
            llm.apply(other)
        assert llm.plan == Plan.removing(1, 2)
        assert torch.equal(logits(llm), logits(plain))
    file.write_bytes(content)
    apply_to(Plan(), llm, plain)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_no_file_of_a_served_model_stays_mapped(tmp_path, name) -> None:
    folder = saved(tmp_path, name)
    plain = opened(folder)
    settings = ServerSettings(model=str(folder), dtype="bfloat16")
    llm = load_served_model(settings)
    before, tied = logits(plain), llm.model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(logits(llm), before)
    assert (llm.model.get_output_embeddings().weight.data_ptr() == tied) == (name == "llama_tied")
    del plain
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_really_falls_and_rises() -> None:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=4096,
        num_attention_heads=4, num_hidden_layers=2,
    )  # fmt: skip
    llm = ElasticLLM(tf.LlamaForCausalLM(config).requires_grad_(False), None, name="wide")
    llm.set_residency("offload")
    ffn = Plan.removing(1, 3)
    freed = sum(llm.facts.block_param_bytes[index] for index in sorted(ffn.removed))
    assert freed > 40e6
    for _ in range(3):
        return_freed_memory()
        dense = resident_bytes()
        llm.apply(ffn)
        assert dense - resident_bytes() == pytest.approx(freed, rel=0.05)
        llm.apply(Plan())
        assert resident_bytes() == pytest.approx(dense, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_making_a_level_of_embeddings_takes_less_than_two_bytes_for_each_value() -> None:
    config = tf.LlamaConfig(
        vocab_size=32_768, hidden_size=512, intermediate_size=64, num_attention_heads=4,
        num_hidden_layers=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).requires_grad_(False).bfloat16()
    llm = ElasticLLM(model, None, name="vocabulary")
    llm.set_residency("offload")
    values = config.vocab_size * config.hidden_size
    small = torch.randn(256, 256)
    small @ small  # which loads its libraries
    return_freed_memory()
    before = resident_bytes()
    mark = Path("/proc/self/clear_refs")
    mark.write_text("5")  # the mark of the most resident memory begins anew
    llm.apply(Plan(embeddings="int4"))
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    assert peak - before < 2 * values
