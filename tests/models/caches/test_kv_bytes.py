"""The memory arithmetic of the KV cache against the bytes of the tensors in real caches."""

import pytest
import torch
from transformers import DynamicCache

from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from tests.models.generation import cached_step
from tests.tiny import FAMILIES, LAYERS, VOCAB_SIZE, WINDOW, each_family, tiny_llm


def real_bytes(llm, tokens: int, *, batch: int = 3, chunk: int | None = None) -> list[int]:
    """Bytes of each layer's tensors after `tokens` tokens, run in chunks of `chunk`."""
    ids = torch.randint(3, VOCAB_SIZE, (batch, tokens))
    cache = DynamicCache(config=llm.model.config)
    for part in ids.split(chunk or tokens, dim=1):
        cached_step(llm.model, part, cache)
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.parametrize("tokens", [WINDOW - 2, WINDOW - 1, WINDOW, 2 * WINDOW + 1])
@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_bytes_equal_those_of_the_real_cache(name, dtype, tokens: int) -> None:
    llm = tiny_llm(name, dtype=dtype)
    predicted = MemoryModel(llm).kv_bytes_by_layer(3, tokens).tolist()
    assert predicted == real_bytes(llm, tokens)
    assert predicted == real_bytes(llm, tokens, chunk=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_removed_attention_block_leaves_two_bytes_a_token(name: str) -> None:
    llm = tiny_llm(name)
    dense = real_bytes(llm, 11)
    for removed in range(LAYERS):
        with llm.applied(Plan.removing(2 * removed)):
            pruned = real_bytes(llm, 11)
        held = min(11, llm.facts.kv_window_tokens[removed] or 11)
        assert pruned[removed] == 2 * 3 * held
        assert pruned[1 - removed] == dense[1 - removed]
