"""Transformers opens a pruned checkpoint by the code in its folder."""

import ast
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rap_env.errors import UnsupportedModelError
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.files.pruned_code import vllm_entries
from rap_env.plan import Plan
from tests.models.files.test_pruned_checkpoint import EVERYTHING, MASK
from tests.models.states import logits
from tests.tiny import FAMILIES, padded_batch, tiny_llm, tiny_tokenizer


def opened(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


@pytest.mark.engine_feature("transformers", "Families", "all")
@pytest.mark.engine_feature("transformers", "Removed blocks", "any")
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_opens_the_masked_model(name: str, tmp_path) -> None:
    llm = tiny_llm(name)
    mask = Plan(EVERYTHING.removed - {2})  # the cache of layer 0 alone is gone
    model = opened(save_pruned(llm, mask, tmp_path / "pruned"))
    ask = {**padded_batch(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, without = model.generate(**ask), model.generate(**ask, use_cache=False)
    with llm.masked(mask):
        assert torch.equal(logits(model), logits(llm))
        assert torch.equal(cached, llm.generate(**ask))
    assert torch.equal(cached, without)


def test_the_code_needs_neither_this_package_nor_more_than_torch(tmp_path) -> None:
    folder = save_pruned(tiny_llm(), MASK, tmp_path / "pruned")
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
    assert imported == {"__future__", "collections", "torch", "transformers", "typing"}
    block = opened(folder).model.layers[0].self_attn
    assert type(block).__module__.startswith("transformers_modules.")


def test_what_transformers_saves_again_opens_again(tmp_path) -> None:
    model = opened(save_pruned(tiny_llm(), MASK, tmp_path / "pruned"))
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(model.state_dict())
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))


def test_without_trust_no_code_is_run_and_no_model_opened(tmp_path) -> None:
    folder = save_pruned(tiny_llm(tokenizer=tiny_tokenizer()), MASK, tmp_path / "pruned")
    (folder / "modeling_rap_pruned.py").write_text("raise RuntimeError('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert AutoTokenizer.from_pretrained(folder)("so").input_ids
    assert load_pruned(folder).pruned == MASK


@pytest.mark.engine_feature("vLLM", "Families", "Llama, Mistral, Qwen2")
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2"])
def test_vllm_reads_which_blocks_are_left_out(name: str, tmp_path) -> None:
    mask = Plan.removing(1, 2)
    folder = save_pruned(tiny_llm(name), mask, tmp_path / "pruned")
    for _ in range(2):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        first, second = config.block_configs
        assert (first.attention.no_op, first.ffn.no_op) == (False, True)
        assert (second.attention.no_op, second.ffn.no_op) == (True, False)
        # Attributes that are not there: vLLM reads the size, since no multiplier is stated.
        assert not hasattr(second.ffn, "ffn_mult")
        assert second.ffn.intermediate_size == config.intermediate_size
        kv_heads = config.num_attention_heads // first.attention.n_heads_in_group
        assert kv_heads == config.num_key_value_heads
        assert getattr(config, "qkv_bias", False) == (name == "qwen2")
        config.save_pretrained(folder)  # what transformers writes again holds it, too
    entries = json.loads((folder / "config.json").read_text())
    assert entries["architectures"] == ["DeciLMForCausalLM"]
    kept = [n for n in load_file(folder / "model.safetensors") if n.startswith("model.layers")]
    parts = {(int(n.split(".")[2]), n.split(".")[3]) for n in kept}
    assert parts == {
        (0, "self_attn"), (0, "input_layernorm"), (1, "mlp"), (1, "post_attention_layernorm")
    }  # fmt: skip


@pytest.mark.engine_feature("vLLM", "Removed blocks", "any, if the first kept block is attention")
@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("gemma2", MASK, "gemma2 is none; known are llama, mistral, qwen2"),
        ("mistral_sliding", Plan.removing(1), "no sliding window, and this mistral has one"),
        ("llama", Plan.removing(0), "cannot start with a feed-forward block"),
        ("llama", EVERYTHING, "cannot start with a feed-forward block"),
    ],
)
def test_what_vllm_cannot_serve_is_not_offered_to_it(name, mask, words, tmp_path) -> None:
    llm = tiny_llm(name)
    with pytest.raises(UnsupportedModelError, match=words):
        vllm_entries(llm.adapter, mask)
    folder = save_pruned(llm, mask, tmp_path / "pruned")
    entries = json.loads((folder / "config.json").read_text())
    assert entries["architectures"] == ["RapPrunedForCausalLM"]
    assert "block_configs" not in entries
    assert vllm_entries(tiny_llm().adapter, Plan.removing(0, 1))  # a layer as a whole
