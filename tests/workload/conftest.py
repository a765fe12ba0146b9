"""A model of three layers whose bytes are round numbers, and a trace of five requests."""

import pytest

from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from tests.workload.drawing import HEADER


@pytest.fixture
def memory() -> MemoryModel:
    return MemoryModel(
        ModelFacts(
            name="paper",
            fingerprint="0" * 64,
            dtype="bfloat16",
            block_param_bytes=(1000, 4000) * 3,
            base_bytes=3000,
            kv_bytes_per_token=(8,) * 3,
            kv_window_tokens=(None,) * 3,
            itemsize=2,
            hidden_size=1,
            ffn_width=1,
            vocab_size=10,
            max_positions=2048,
        )
    )


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:17:0{n},{100 * n},{n}\n" for n in range(1, 6))
    path.write_text(HEADER + rows)
    return path
