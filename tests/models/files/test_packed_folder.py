from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rap_env.errors import ChecksumError, ModelNotAvailableError, UnsupportedModelError
from rap_env.models.files.gguf_source import converted_gguf
from rap_env.models.files.loading import load_llm
from rap_env.models.files.weight_files import PACKED_FILE, load_native, load_weights
from rap_env.models.weights.packed_modules import PackedEmbedding, PackedLinear, PackedModule
from rap_env.plan import Plan
from tests.models.states import tensor_bytes
from tests.models.tiny_gguf import write_gguf, write_tiny_gguf

IDS = torch.tensor([[5, 9, 33, 7, 100, 260]])
SIZES = {"hidden": 64, "ffn": 96}


def both(path: Path) -> tuple[Any, Any]:
    """The model of a file with its own bits, and with float32 weights."""
    return (
        load_native(converted_gguf(path, packed=True), torch.float32),
        load_weights(converted_gguf(path), torch.float32),
    )


def check_weights(native: Any, wide: Any) -> int:
    """Compare all weights within what rounding scales to bfloat16 allows; count packed modules."""
    modules = dict(native.named_modules())
    for name, parameter in wide.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        if not (isinstance(module, PackedModule) and attribute in module.matrices):
            assert torch.equal(getattr(module, attribute), parameter), name
            continue
        expected = (
            parameter.T if type(wide.get_submodule(owner)).__name__ == "Conv1D" else parameter
        )
        actual = module.matrices[attribute].widened(torch.float32)
        coarse = 2.0**-7 if module.level == "int4" else 0.75 / 127
        largest = expected.abs().amax(dim=1, keepdim=True)
        assert ((actual - expected).abs() <= 2 * coarse * largest).all(), name
    return sum(isinstance(module, PackedModule) for module in modules.values())


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "level"),
    [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q5_0", "int8"), ("Q5_1", "int8"), ("Q8_0", "int8")],
)
def test_a_file_is_loaded_with_its_own_bits(kind, level, tied, lonely, tmp_path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind, tied=tied, **SIZES)
    native, wide = both(tmp_path / "tiny.gguf")
    assert check_weights(native, wide) == 2 * 7 + 2
    up, rows, head = native.model.layers[1].mlp.up_proj, native.model.embed_tokens, native.lm_head
    assert isinstance(up, PackedLinear)
    assert isinstance(rows, PackedEmbedding)
    assert up.level == rows.level == head.level == level
    assert (head.weight_codes is rows.weight_codes) == tied
    # the same weights up to rounding give the same distribution but for noise of that size
    actual, expected = (torch.log_softmax(m(IDS).logits, -1) for m in (native, wide))
    assert (expected.exp() * (expected - actual)).sum(-1).abs().max() < 0.02
    configs = [{**m.config.to_dict(), "_name_or_path": ""} for m in (native, wide)]
    assert configs[0] == configs[1]
    assert native.generation_config == wide.generation_config


def test_buffers_and_dtype_are_those_of_transformers(lonely: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_1", **SIZES)
    native = load_native(converted_gguf(tmp_path / "tiny.gguf", packed=True), torch.bfloat16)
    wide = load_weights(converted_gguf(tmp_path / "tiny.gguf"), torch.bfloat16)
    actual = dict(native.named_buffers())
    buffers = dict(wide.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert actual[name].dtype == buffer.dtype
        assert torch.equal(actual[name], buffer), name
    assert native.dtype == wide.dtype == native.config.dtype == torch.bfloat16
    assert native.config._attn_implementation == wide.config._attn_implementation
    assert not any(
        parameter.requires_grad or parameter.is_meta for parameter in native.parameters()
    )
    assert not native.training


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_unquantised_matrices_keep_their_dtype(kind: str, lonely: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    folder = converted_gguf(tmp_path / "tiny.gguf", packed=True)
    with safe_open(folder / PACKED_FILE, "pt") as file:
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_dtype() == kind
        assert file.get_slice("model.norm.weight").get_dtype() == "F32"
    native, wide = both(tmp_path / "tiny.gguf")
    assert torch.equal(native(IDS).logits, wide(IDS).logits)
    assert native.lm_head.weight is native.model.embed_tokens.weight


def write_gemma(path: Path) -> None:
    """A GGUF file of a two-layer Gemma 3, with blocks of Q4_K made of random bytes."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "a", "b", "ab"]
    tokens += [f"t{number}" for number in range(64 - len(tokens))]
    entries = {
        "name": "Tiny", "context_length": 64, "embedding_length": 256, "block_count": 2,
        "feed_forward_length": 256, "head_count": 2, "head_count_kv": 1, "key_length": 128,
        "value_length": 128, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6,
        "sliding_window": 8, "tokenizer_model": "llama", "token_list": tokens,
        "token_scores": [-float(number) for number in range(64)],
        "token_types": [3] * 4 + [1] * 60, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    rng = np.random.default_rng(0)

    def matrix(rows: int, kind: str) -> tuple[np.ndarray, GGMLQuantizationType]:
        if kind == "Q4_K":
            blocks = rng.integers(0, 256, (rows, 144), dtype=np.uint8)
            blocks[:, :4] = np.full((rows, 2), 0.002, np.float16).view(np.uint8)
        else:
            values = rng.normal(size=(rows, 256)).astype(np.float32) / 16
            blocks = quantize(values, GGMLQuantizationType[kind])
        return blocks, GGMLQuantizationType[kind]

    def norm(size: int = 256) -> tuple[np.ndarray, GGMLQuantizationType]:
        return rng.uniform(0.5, 1.5, size).astype(np.float32), GGMLQuantizationType.F32

    matrices = {
        "attn_q": (256, "Q5_0"), "attn_k": (128, "Q5_0"), "attn_v": (128, "Q5_0"),
        "attn_output": (256, "Q4_K"),
        "ffn_gate": (256, "Q8_0"), "ffn_up": (256, "Q8_0"), "ffn_down": (256, "Q4_K"),
    }  # fmt: skip
    norms = dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), 256)
    norms |= {"attn_q_norm": 128, "attn_k_norm": 128}
    tensors = {"token_embd.weight": matrix(64, "Q8_0"), "output_norm.weight": norm()}
    for layer in range(2):
        for part, shape in matrices.items():
            tensors[f"blk.{layer}.{part}.weight"] = matrix(*shape)
        for part, size in norms.items():
            tensors[f"blk.{layer}.{part}.weight"] = norm(size)
    write_gguf(path, "gemma3", entries, tensors)


def test_gemma_with_mixed_types(lonely: Path, tmp_path: Path) -> None:
    write_gemma(tmp_path / "gemma.gguf")
    native, wide = both(tmp_path / "gemma.gguf")
    assert check_weights(native, wide) == 2 * 7 + 2
    layer = native.model.layers[0]
    assert layer.self_attn.o_proj.level == layer.mlp.down_proj.level == "int4"
    assert layer.self_attn.q_proj.level == layer.mlp.up_proj.level == "int8"
    assert torch.equal(native.model.embed_tokens.embed_scale, wide.model.embed_tokens.embed_scale)
    llm = load_llm(tmp_path / "gemma.gguf", device="cpu", dtype="float32")
    llm.set_residency("offload")
    llm.apply(Plan.of({"layer00.ffn": "int4"}))  # the layer keeps what has four bits already
    assert llm.model.model.layers[0].mlp.up_proj.level == "int4"
    assert tensor_bytes(llm.model) < tensor_bytes(native)
    llm.apply(Plan())
    ids = torch.arange(2, 30)[None]  # longer than the window
    assert torch.equal(llm.model(ids).logits, native(ids).logits)
    actual, expected = (torch.log_softmax(m(ids).logits, -1) for m in (native, wide))
    assert (expected.exp() * (expected - actual)).sum(-1).abs().max() < 0.02


@pytest.mark.parametrize(("rows", "head"), [("Q5_0", "Q8_0"), ("Q8_0", "Q4_1"), ("Q4_0", "F16")])
def test_the_finer_copy_of_a_vocabulary_is_kept(
    rows, head, lonely, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rap_env.models.files.gguf_conversion._PIECE_VALUES", 5 * 64)
    source = write_tiny_gguf(tmp_path / "tied.gguf", kind=rows, head=head, **SIZES)
    native = load_native(converted_gguf(tmp_path / "tied.gguf", packed=True), torch.float32)
    embeddings, shared = native.model.embed_tokens, native.lm_head
    if isinstance(shared, PackedModule):
        assert shared.weight_codes is embeddings.weight_codes
        kept = shared.matrices["weight"].widened(torch.float32)
    else:
        assert shared.weight is embeddings.weight
        kept = shared.weight
    assert native.config.tie_word_embeddings
    assert (kept - source.lm_head.weight).norm() < 0.01 * kept.norm()


@pytest.mark.parametrize("others", ["all rows", "one row"])
def test_a_head_of_its_own_is_kept(others: str, lonely: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, kind="Q5_0", head="Q8_0", tied=others == "one row", **SIZES)
    if others == "one row":
        with_tensors(path, lambda tensors: tensors["output.weight"][-1].fill(1))
    native, wide = both(path)
    assert check_weights(native, wide) == 2 * 7 + 2
    assert not native.config.tie_word_embeddings
    assert (native.model.embed_tokens.level, native.lm_head.level) == ("int8", "int8")
    assert native.lm_head.weight_codes is not native.model.embed_tokens.weight_codes


def with_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the stored tensors of a GGUF file in place."""
    file = GGUFReader(path, "r+")
    change({tensor.name: tensor.data for tensor in file.tensors})
    file.data.flush()


def test_the_blocks_of_a_transposed_matrix_are_kept(lonely: Path, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.gguf"
    blocks = write_gpt2(path)
    native, wide = both(path)
    assert check_weights(native, wide) == 2 * 4 + 2
    name, matrix = "blk.1.ffn_up.weight", native.transformer.h[1].mlp.c_fc.matrices["weight"]
    exact = torch.from_numpy(dequantize(blocks[name], GGMLQuantizationType.Q4_0))
    assert (matrix.level, matrix.shape) == ("int4", (256, 64))
    # only scales are rounded; quantising anew would move many of the weights by half a step
    assert ((matrix.widened(torch.float32) - exact).abs() <= 2.0**-8 * exact.abs()).all()


def write_gpt2(path: Path, positions: int = 1024) -> dict[str, np.ndarray]:
    """A GGUF file of a two-layer GPT-2 in Q4_0; returns its stored tensors."""
    tokens = ["<|endoftext|>", *(chr(ord("!") + number) for number in range(62)), "AB"]
    entries = {
        "name": "Tiny", "context_length": positions, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 256, "head_count": 2, "layer_norm_eps": 1e-5,
        "tokenizer_model": "gpt2", "token_list": tokens, "token_types": [3] + [1] * 63,
        "token_merges": ["A B"], "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    shapes = {
        "token_embd.weight": ((64, 64), "Q8_0"), "output.weight": ((64, 64), "Q8_0"),
        "position_embd.weight": ((positions, 64), "F32"),
        "output_norm.weight": ((64,), "F32"), "output_norm.bias": ((64,), "F32"),
    }  # fmt: skip
    sizes = {
        "attn_norm": (64,), "ffn_norm": (64,), "attn_qkv": (192, 64), "attn_output": (64, 64),
        "ffn_up": (256, 64), "ffn_down": (64, 256),
    }  # fmt: skip
    for layer in range(2):
        for part, shape in sizes.items():
            kind = "Q4_0" if len(shape) == 2 else "F32"
            shapes[f"blk.{layer}.{part}.weight"] = shape, kind
            shapes[f"blk.{layer}.{part}.bias"] = shape[:1], "F32"
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (shape, kind) in shapes.items():
        stored = GGMLQuantizationType[kind]
        values = rng.normal(size=shape).astype(np.float32) / 8
        tensors[name] = quantize(values, stored), stored
    write_gguf(path, "gpt2", entries, tensors)
    return {name: blocks for name, (blocks, _) in tensors.items()}


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_an_unquantised_folder_is_what_transformers_would_write(family, lonely, tmp_path) -> None:
    path = tmp_path / f"{family}.gguf"
    if family == "llama":
        write_tiny_gguf(path, kind="Q4_1", **SIZES)
    else:
        {"gemma": write_gemma, "gpt2": write_gpt2}[family](path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "expected")
    folder = converted_gguf(path)
    for expected in (tmp_path / "expected").iterdir():
        assert (folder / expected.name).read_bytes() == expected.read_bytes(), expected.name


def test_tensors_of_other_shapes_are_rejected(lonely: Path, tmp_path: Path) -> None:
    write_gpt2(tmp_path / "gpt2.gguf", positions=8)  # transformers expects 1,024
    with pytest.raises(UnsupportedModelError, match="wpe.* has shape"):
        converted_gguf(tmp_path / "gpt2.gguf", packed=True)


def test_a_file_without_a_tensor_is_rejected(lonely: Path, tmp_path: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_0", leave_out=missing, **SIZES)
    with pytest.raises(UnsupportedModelError, match=rf"lacks 1 tensors .* such as '{missing}'"):
        converted_gguf(tmp_path / "tiny.gguf", packed=True)
    assert not list((lonely / "models").glob("gguf-*"))


def test_a_truncated_packed_file_is_rejected_or_made_again(lonely: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_0", **SIZES)
    folder = converted_gguf(tmp_path / "tiny.gguf", packed=True)
    content = (folder / PACKED_FILE).read_bytes()
    (folder / PACKED_FILE).write_bytes(content[:-100])
    with pytest.raises(ChecksumError, match="truncated or damaged"):
        load_native(folder, torch.float32)
    assert converted_gguf(tmp_path / "tiny.gguf", packed=True) == folder
    assert (folder / PACKED_FILE).read_bytes() == content
    (folder / PACKED_FILE).unlink()
    with pytest.raises(ModelNotAvailableError, match=r"has no packed\.safetensors"):
        load_native(folder, torch.float32)
