"""The lean Llama computes what transformers' does, bit for bit but for one token in bfloat16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from rap_env.errors import UnsupportedModelError
from rap_env.models.caches.kv_cache import cache_argument
from rap_env.models.files.gguf_source import converted_gguf
from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import LeanLlama, lean_config
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.tensors import fingerprint_of
from rap_env.plan import Plan
from tests.models.states import saved
from tests.models.tiny_gguf import write_tiny_gguf
from tests.tiny import padded_batch, randomise, tiny_config

PROMPTS = [[5, 9, 33, 7, 100, 12, 40, 8, 21] * 4, [3, 60, 14], [70, 8, 9, 10, 11, 12, 13] * 5]
HEAVY = (
    "accelerate",
    "gguf",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.onnx",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
)
"""What transformers' Llama imports and serving does not need."""


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    path = folder / "tiny.gguf"
    write_tiny_gguf(path, kind="Q8_0", hidden=64, ffn=96)
    return path


@pytest.fixture
def both(gguf_path, tmp_path, monkeypatch) -> tuple[ElasticLLM, ElasticLLM]:
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    lean = load_llm(gguf_path, device="cpu", dtype="float32", lean=True)
    full = load_llm(gguf_path, device="cpu", dtype="float32")
    assert isinstance(lean.model, LeanLlama)
    assert isinstance(full.model, tf.LlamaForCausalLM)
    return lean, full


def served(llm: ElasticLLM, plan: Plan) -> list[torch.Tensor]:
    """Logits of all passes of batches that join, shrink, and change to a plan and back."""
    batch, other = LiveBatch(llm), LiveBatch(llm, most_tokens=6)
    actual = [batch.prefill(PROMPTS[:1]), batch.extend([7])]
    actual.append(other.prefill(PROMPTS[1:]))
    batch.join(other)
    actual.append(batch.extend([1, 2, 3]))
    llm.apply(plan)
    actual += [batch.extend([4, 5, 6]), batch.append([[7, 8], [9, 10], [11, 12]])]
    llm.apply(Plan())
    actual.append(batch.extend([13, 14, 15]))
    batch.keep([1])
    actual.append(batch.extend([16]))
    batch.close()
    return actual


PLANS = {
    "mask": Plan.removing("layer00.ffn", "layer01.attn"),
    "caches": Plan.uniform(2, caches="int4"),
    "window": Plan.uniform(2, caches="int4-window32"),
    "weights": Plan.uniform(2, weights="int4"),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_it_serves_the_same_logits(both, plan):
    lean, full = (served(llm, plan) for llm in both)
    assert len(lean) == len(full)
    assert all(map(torch.equal, lean, full))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 449])
def test_norms_of_few_and_of_many_rows_are_those_of_transformers(both, dtype, rows):
    lean, full = (llm.model.model.norm.to(dtype) for llm in both)
    states = torch.randn(2, rows, 64).to(dtype)
    given = states.clone()
    assert torch.equal(lean(states), full(states))
    assert torch.equal(states, given)


def test_identity_sizes_and_tokenizer_are_those_of_the_other_model(both):
    lean, full = both
    assert lean.fingerprint == full.fingerprint
    assert lean.facts == full.facts
    assert str(lean.tokenizer) == str(full.tokenizer)
    assert type(lean.tokenizer) is type(full.tokenizer)
    assert lean.model.generation_config.to_dict() == full.model.generation_config.to_dict()
    assert list(lean.model.state_dict()) == list(full.model.state_dict())


def test_an_unpacked_folder_is_served_too(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    lean, full = (load_llm(folder, device="cpu", lean=lean) for lean in (True, False))
    assert isinstance(lean.model, LeanLlama)
    assert lean.facts == full.facts
    ids = torch.tensor([[5, 9, 33, 7]])
    assert torch.equal(lean.model(ids).logits, full.model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_unpacked_weights_give_the_same_logits(tmp_path, dtype, kv_heads, biased):
    config = tiny_config()
    config.num_attention_heads, config.num_key_value_heads = 4, kv_heads
    config.head_dim = config.hidden_size // 4
    config.attention_bias = config.mlp_bias = biased
    wide = tf.LlamaForCausalLM(config)
    randomise(wide)
    wide = wide.to(dtype).eval()
    config.save_pretrained(tmp_path)
    lean = LeanLlama(lean_config(tmp_path), dtype)
    lean.load_state_dict(wide.state_dict(), assign=True)
    lean.eval()
    caches = DynamicCache(config=config), DynamicCache(config=config)
    inputs = padded_batch()
    more = torch.cat((inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)), dim=1)
    with torch.no_grad():
        for given in (
            {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)},
            {"input_ids": torch.tensor([[5], [6], [7]]), "attention_mask": more},
        ):
            actual = lean(**given, cache=caches[0]).logits
            expected = wide(**given, **{cache_argument(wide): caches[1]}).logits
            # Norms of single tokens in bfloat16 add in another order.
            ulps = 0.0 if dtype == torch.float32 or given["input_ids"].shape[1] > 1 else 2**-6
            torch.testing.assert_close(actual, expected, rtol=ulps, atol=ulps)
        ids = inputs["input_ids"]
        assert torch.equal(lean(ids, logits_to_keep=2).logits, wide(ids, logits_to_keep=2).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qwen2_model_has_biases_and_the_same_logits(tmp_path, dtype):
    config = tiny_config("qwen2")
    wide = tf.Qwen2ForCausalLM(config)
    randomise(wide)
    wide = wide.to(dtype).eval()
    config.save_pretrained(tmp_path)
    lean = LeanLlama(lean_config(tmp_path), dtype)
    lean.load_state_dict(wide.state_dict(), assign=True)
    ids = padded_batch()["input_ids"][:1]
    with torch.no_grad():
        assert torch.equal(lean(ids).logits, wide(ids).logits)
    assert fingerprint_of(lean.config, []) == fingerprint_of(wide.config, [])
    config.layer_types = ["full_attention", "sliding_attention"]
    config.save_pretrained(tmp_path)
    assert lean_config(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": None},
        {"head_dim": None},
        {"mlp_bias": None},
    ],
)
def test_other_models_are_left_to_transformers(tmp_path, changes):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert lean_config(tmp_path) is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert lean_config(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_damaged_config_is_left_to_transformers(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert lean_config(tmp_path) is None


def test_what_it_cannot_do_is_one_clear_error(both):
    lean, _ = both
    with pytest.raises(UnsupportedModelError, match=r"lean=True cannot generate.*lean=False"):
        lean.generate(torch.tensor([[5]]))
    with pytest.raises(UnsupportedModelError, match=r"lean=True cannot run in steps"):
        PartialForward(lean)


SERVE = """
import json, sys, torch, rap_env.serving.server
from rap_env.models.live.live_batch import LiveBatch
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
llm = build_stack(ServerSettings(model=sys.argv[1], device='cpu')).engine.llm
batch = LiveBatch(llm)
logits = batch.prefill([[5, 9, 33, 7], [3, 60]])
batch.extend(logits.argmax(dim=-1).tolist())
print(json.dumps([type(llm.model).__name__, *(n for n in {heavy!r} if n in sys.modules)]))
"""


def test_serving_a_packed_llama_imports_nothing_heavy(gguf_path, tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path))
    converted_gguf(gguf_path, packed=True)  # conversion imports all of them
    done = subprocess.run(
        [sys.executable, "-c", SERVE.format(heavy=HEAVY), str(gguf_path)],
        env={**os.environ, "RAP_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["LeanLlama"]
