from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.gguf_reader import GGUFReader
from gguf.quants import dequantize

from rap_env.errors import UnsupportedModelError
from rap_env.models.files.gguf_conversion import GgufFile, packed_blocks, packs_as_int4

_HALF_ULP = 2.0**-8  # largest relative error of rounding to bfloat16, and as much for arithmetic
# where blocks of each type have their 16-bit scales, in bytes
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "Q8_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82),
}  # fmt: skip
INT4 = ["Q4_0", "Q4_1", "Q4_K"]
INT8 = [name for name in _SCALES if name not in INT4]


def random_blocks(name: str, rows: int = 128, inputs: int = 512) -> np.ndarray:
    """Random codes with random scales of usual size, (rows, bytes)."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (rows, inputs // elements, size), dtype=np.uint8)
    for begin in _SCALES[name]:
        scales = rng.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., begin : begin + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with an entry and a tensor of several types."""
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    writer.add_bool("a.bool", True)
    writer.add_float64("a.double", 0.25)
    writer.add_int16("a.short", -3)
    writer.add_string("a.text", "Ünïcode")
    writer.add_string("a.empty", "")
    writer.add_array("a.texts", ["x", "yz", ""])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.scores", [0.5, -1.5])
    writer.add_array("a.counts", [1, 2, 3])
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for kind in ("Q4_0", "Q8_0", "BF16", "F16", "F32"):
        quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "all.gguf"


def test_entries_are_those_of_the_reference_reader(path: Path) -> None:
    expected, actual = GGUFReader(path), GgufFile(path)
    names = [name for name in expected.fields if not name.startswith("GGUF.")]
    assert list(actual.fields) == names
    assert actual.value("a.texts") == ["x", "yz", ""]
    assert actual.value("absent", 7) == 7


def test_another_byte_order_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="of the other byte order"):
        GgufFile(path)


@pytest.mark.parametrize("name", INT4)
def test_four_bits_stay_as_they_are(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    matrix = packed_blocks(blocks, kind)
    assert packs_as_int4(kind)
    assert (matrix.level, matrix.shape) == ("int4", (128, 512))
    expected = torch.from_numpy(dequantize(blocks, kind)).view(128, -1, 32)
    actual = matrix.widened(torch.float32).view_as(expected)
    low, high = expected.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()) + (high - low)
    assert ((actual - expected).abs() <= _HALF_ULP * largest).all()
    assert (actual != actual[0, 0, 0]).any()


@pytest.mark.parametrize("name", INT8)
def test_other_types_are_rounded_to_eight_bits(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    matrix = packed_blocks(blocks, kind)
    assert not packs_as_int4(kind)
    assert (matrix.level, matrix.shape) == ("int8", (128, 512))
    assert matrix.scales.shape == (128,)
    expected = torch.from_numpy(dequantize(blocks, kind))
    step = expected.abs().amax(dim=1, keepdim=True) / 127
    # half a step, and what rounding the scale to bfloat16 shifts the largest code by
    assert ((matrix.widened(torch.float32) - expected).abs() <= (0.5 + 127 * 2.0**-9) * step).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_rows_are_put_in_order(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    order = np.random.default_rng(2).permutation(len(blocks))
    actual, expected = packed_blocks(blocks, kind, order), packed_blocks(blocks[order], kind)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.scales, expected.scales)


def test_large_tensors_are_rounded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q8_0")
    whole = packed_blocks(blocks, GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("rap_env.models.files.gguf_conversion._PIECE_VALUES", 5 * 512)
    pieces = packed_blocks(blocks, GGMLQuantizationType.Q8_0)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)
