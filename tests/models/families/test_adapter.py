"""Supported and rejected model families, and facts read from a config alone."""

import pytest
import torch
import transformers as tf

from rap_env.errors import UnsupportedModelError
from rap_env.models.families.families import FAMILIES as KNOWN
from rap_env.models.families.families import adapter_for
from tests.tiny import FAMILIES, LAYERS, padded_batch, tiny_config, tiny_model


def test_every_known_family_has_a_tiny_model() -> None:
    assert {tiny_config(name).model_type for name in FAMILIES} == set(KNOWN)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends in both directions"),
    ],
)
def test_layouts_that_cannot_be_masked_are_rejected(name: str, change: dict, text: str) -> None:
    config = tiny_config(name)
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=text):
        adapter_for(config)


def test_a_model_without_a_head_is_rejected() -> None:
    model = tf.AutoModel.from_config(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match="load it with AutoModelFor"):
        adapter_for(model.config).sites(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_positions_and_vocabulary_are_those_of_the_text_part(name: str) -> None:
    model = tiny_model(name)
    adapter = adapter_for(model.config)
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**padded_batch())
        hidden = adapter.decoder(model)(**padded_batch()).last_hidden_state
    handle.remove()
    assert torch.equal(hidden, seen[0])
    assert len(adapter.layers(model)) == adapter.num_layers == LAYERS
    assert adapter.max_positions == 64
    assert adapter.vocab_size == head.weight.shape[0]
    # OPT projects to another width before its head.
    assert adapter.hidden_size == (16 if name == "opt" else head.weight.shape[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_cover_each_layer_without_overlap(name: str) -> None:
    model = tiny_model(name)
    adapter = adapter_for(model.config)
    sites = adapter.sites(model)
    assert [site.index for site in sites] == list(range(2 * LAYERS))
    for layer, attn, ffn in zip(adapter.layers(model), sites[0::2], sites[1::2], strict=True):
        owned = [id(p) for site in (attn, ffn) for part in site.modules for p in part.parameters()]
        # In these families nothing of a layer serves both blocks, so the two own all of it.
        assert sorted(owned) == sorted(id(p) for p in layer.parameters())


@pytest.mark.parametrize(
    ("name", "change", "width"),
    [
        ("llama", {}, 24),
        ("gpt2", {}, 4 * 16),
        ("gpt2", {"n_inner": 40}, 40),
        ("opt", {}, 24),
        ("mixtral", {}, 2 * 24),
        ("qwen2_moe", {}, 2 * 16 + 24),
        ("qwen2_moe", {"intermediate_size": 99}, 99),
        ("qwen2_moe", {"intermediate_size": 99, "mlp_only_layers": []}, 2 * 16 + 24),
        ("qwen2_moe", {"num_experts": 0}, 24),
        ("qwen2_moe", {"decoder_sparse_step": 3}, 24),
    ],
)
def test_ffn_width_counts_the_experts_that_a_token_visits(name, change, width) -> None:
    config = tiny_config(name)
    for key, value in change.items():
        setattr(config, key, value)
    assert adapter_for(config).ffn_width == width
