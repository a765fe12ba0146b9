"""Live masks on a CUDA device: the same states, and memory that the allocator really has back."""

import pytest
import torch

from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.tiny import tiny_llm, tiny_model

pytestmark = pytest.mark.gpu


def on_cuda(name: str = "llama", dtype: torch.dtype = torch.float32) -> ElasticLLM:
    return ElasticLLM(tiny_model(name, dtype=dtype).to("cuda"), None, name=name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize("residency", ["resident", "offload"])
def test_restored_blocks_compute_what_they_do_on_the_cpu(name, residency) -> None:
    llm, prompts = on_cuda(name), [[5, 6, 7, 8], [9, 10]]
    llm.set_residency(residency)
    llm.apply(Plan.removing(0, 3))
    LiveBatch(llm).prefill(prompts)
    llm.apply(Plan())
    expected = LiveBatch(tiny_llm(name)).prefill(prompts)
    torch.testing.assert_close(
        LiveBatch(llm).prefill(prompts).cpu(), expected, rtol=1e-4, atol=1e-4
    )


def test_offload_returns_memory_to_the_allocator() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=4096,
        num_attention_heads=4, num_hidden_layers=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).to("cuda", torch.bfloat16)
    llm = ElasticLLM(model, None, name="wide")
    llm.set_residency("offload")
    mask = Plan.removing(1, 2)
    freed = sum(llm.facts.block_param_bytes[index] for index in sorted(mask.removed))
    dense = torch.cuda.memory_allocated()
    before = [p.detach().cpu().clone() for p in llm.model.parameters()]
    llm.apply(mask)
    assert dense - torch.cuda.memory_allocated() == pytest.approx(freed, rel=0.05)
    llm.apply(Plan())
    assert torch.cuda.memory_allocated() == pytest.approx(dense, rel=0.05)
    for was, now in zip(before, llm.model.parameters(), strict=True):
        assert torch.equal(was, now.detach().cpu())
