from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.files.gguf_reader import GgufFile, transformers_reads
from tests.models.tiny_gguf import write_tiny_gguf


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
    wanted, found = GGUFReader(path), GgufFile(path)
    names = [name for name in wanted.fields if not name.startswith("GGUF.")]
    assert list(found.fields) == names
    assert found.value("a.texts") == ["x", "yz", ""]
    for name in names:
        assert found.value(name) == wanted.fields[name].contents(), name
        assert found.fields[name].types == wanted.fields[name].types
    assert found.value("absent", 7) == 7


def test_tensors_are_those_of_the_reference_reader(path: Path) -> None:
    wanted, found = GGUFReader(path).tensors, GgufFile(path).tensors
    assert len(found) == len(wanted) == 5
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.name, mine.tensor_type) == (theirs.name, theirs.tensor_type)
        assert (mine.n_bytes, mine.n_elements) == (theirs.n_bytes, theirs.n_elements)
        assert mine.data_offset == theirs.data_offset
        assert np.array_equal(mine.shape, theirs.shape)
        assert mine.data.dtype == theirs.data.dtype
        assert np.array_equal(mine.data, theirs.data)


@pytest.mark.parametrize("removed", [1, 200, 900])
def test_a_truncated_file_is_rejected(removed: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-removed])
    with pytest.raises(ChecksumError, match=r"all\.gguf is truncated .*download it again"):
        GgufFile(path)


def test_another_byte_order_is_rejected(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:8] = content[4:8][::-1]
    path.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"version 0x3000000, and little-endian"):
        GgufFile(path)


def test_transformers_reads_the_file_once_and_others_as_before(path: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "other.gguf")
    file, before = GgufFile(path), (gguf.GGUFReader, gguf.get_tensor_name_map)
    with transformers_reads(file):
        assert gguf.GGUFReader(str(path)) is file
        assert isinstance(gguf.GGUFReader(tmp_path / "other.gguf"), GGUFReader)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert names.get_name("model.layers.1.mlp.up_proj") == "blk.1.ffn_up"
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
