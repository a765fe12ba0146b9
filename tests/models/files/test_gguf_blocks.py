"""Packed blocks have the values that gguf's own dequantisation gives, up to rounded scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from rap_env.models.files.gguf_blocks import packed_blocks, packs_as_int4

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


@pytest.mark.parametrize("name", INT4)
def test_four_bits_stay_as_they_are(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    matrix = packed_blocks(blocks, kind)
    assert packs_as_int4(kind)
    assert (matrix.level, matrix.shape) == ("int4", (128, 512))
    wanted = torch.from_numpy(dequantize(blocks, kind)).view(128, -1, 32)
    found = matrix.widened(torch.float32).view_as(wanted)
    low, high = wanted.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()) + (high - low)
    assert ((found - wanted).abs() <= _HALF_ULP * largest).all()
    assert (found != found[0, 0, 0]).any()


@pytest.mark.parametrize("name", INT8)
def test_other_types_are_rounded_to_eight_bits(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    matrix = packed_blocks(blocks, kind)
    assert not packs_as_int4(kind)
    assert (matrix.level, matrix.shape) == ("int8", (128, 512))
    assert matrix.scales.shape == (128,)
    wanted = torch.from_numpy(dequantize(blocks, kind))
    step = wanted.abs().amax(dim=1, keepdim=True) / 127
    # half a step, and what rounding the scale to bfloat16 shifts the largest code by
    assert ((matrix.widened(torch.float32) - wanted).abs() <= (0.5 + 127 * 2.0**-9) * step).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_rows_are_put_in_order(name: str) -> None:
    kind, blocks = GGMLQuantizationType[name], random_blocks(name)
    order = np.random.default_rng(2).permutation(len(blocks))
    found, wanted = packed_blocks(blocks, kind, order), packed_blocks(blocks[order], kind)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


def test_large_tensors_are_rounded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q8_0")
    whole = packed_blocks(blocks, GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("rap_env.models.files.gguf_blocks._PIECE_VALUES", 5 * 512)
    pieces = packed_blocks(blocks, GGMLQuantizationType.Q8_0)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)
