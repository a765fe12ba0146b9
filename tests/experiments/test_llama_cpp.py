"""llama.cpp's logits without its library, and what a model without a GGUF file gets."""

import numpy as np
import pytest

from experiments.llama_cpp import LlamaCpp, gguf_file
from experiments.study.console import ExperimentError


def test_logits_of_a_part_stay_when_the_engine_uses_its_buffer_again(monkeypatch):
    engine, buffer = LlamaCpp.__new__(LlamaCpp), np.zeros((256, 3), np.float32)

    def decode(ids, start, all_logits):
        buffer[:] = start
        return buffer[: len(ids)]

    monkeypatch.setattr(engine, "clear", lambda: None)
    monkeypatch.setattr(engine, "decode", decode)
    logits = engine.logits(np.arange(600, dtype=np.int32))
    assert logits[:, 0].tolist() == [*[0] * 256, *[256] * 256, *[512] * 87]


@pytest.mark.parametrize("name", ["some-model", "missing.gguf"])
def test_a_model_without_a_gguf_file_is_rejected(tmp_path, name):
    (tmp_path / "some-model").mkdir()
    with pytest.raises(ExperimentError, match="GGUF"):
        gguf_file(str(tmp_path / name))
