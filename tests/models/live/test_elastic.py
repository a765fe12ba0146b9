"""Masking a live model equals deleting the blocks, and is exactly reversible."""

import copy

import pytest
import torch

from rap_env.errors import UnknownNameError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from tests.models.generation import token_by_token
from tests.models.states import logits, weights_hash
from tests.tiny import FAMILIES, LAYERS, each_family, padded_batch, randomise, tiny_llm, tiny_model

NUM_BLOCKS = 2 * LAYERS
MASKS = {
    "first attention": Plan.removing(0),
    "all attention": Plan.removing(*range(0, NUM_BLOCKS, 2)),
    "all ffn": Plan.removing(*range(1, NUM_BLOCKS, 2)),
    "everything": Plan.removing(*range(NUM_BLOCKS)),
}
DTYPES = [torch.float32, torch.bfloat16]

# The last linear map of each block: with its weights at zero the block adds nothing.
OUTPUTS = (
    ("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attention.dense"),
    ("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj", "mlp.c_proj",
     "mlp.dense_4h_to_h", "fc2"),
)  # fmt: skip


def zeroed(llm: ElasticLLM, mask: Plan):
    """A copy of the model in which the masked blocks' outputs are zero by their weights."""
    model = copy.deepcopy(llm.model)
    layers = llm.adapter.layers(model)
    for index in sorted(mask.removed):
        actual = [
            parameter
            for name, parameter in layers[index // 2].named_parameters()
            if name.startswith(OUTPUTS[index % 2])
        ]
        assert actual
        with torch.no_grad():
            for parameter in actual:
                parameter.zero_()
    return model


@pytest.mark.engine_feature("here", "Families", "all")
@pytest.mark.engine_feature("here", "Removed blocks", "any")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FAMILIES]
    + [(name, torch.bfloat16) for name in ("llama", "gemma2", "gpt2", "opt", "qwen2_moe")],
)
def test_a_mask_equals_blocks_whose_output_is_zero(name: str, dtype: torch.dtype) -> None:
    llm = tiny_llm(name, dtype=dtype)
    for mask in [*MASKS.values(), *map(Plan.removing, range(NUM_BLOCKS))]:
        with llm.applied(mask):
            masked = logits(llm)
        assert torch.equal(masked, logits(zeroed(llm, mask))), mask


@each_family("name", mask=MASKS, dtype=DTYPES)
def test_a_loop_over_tokens_equals_one_pass(name, mask, dtype) -> None:
    llm = tiny_llm(name, dtype=dtype)
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    with llm.applied(mask):
        at_once = logits(llm).float()[seen]
        in_steps = token_by_token(llm.model, **batch, prompt=5).float()[seen]
    rounding = 1e-4 if dtype == torch.float32 else 0.02  # bfloat16 keeps 8 bits
    assert (in_steps - at_once).abs().max() <= rounding * at_once.abs().max()


@each_family("name", dtype=DTYPES)
def test_without_a_mask_it_is_the_original_model_bit_for_bit(name, dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    before, weights = logits(model), weights_hash(model)
    llm = ElasticLLM(model, None, name=name)
    assert torch.equal(logits(llm), before)
    for mask in MASKS.values():
        llm.apply(mask)
        assert not torch.equal(logits(llm), before)
        llm.generate(**padded_batch(), max_new_tokens=2, do_sample=False)
        llm.apply(Plan())
        assert torch.equal(logits(llm), before)
    assert weights_hash(llm.model) == weights


def test_a_block_that_the_model_lacks_is_rejected_and_nothing_changes() -> None:
    llm = tiny_llm()
    llm.apply(Plan.removing(1))
    before = logits(llm)
    with pytest.raises(UnknownNameError, match=r"block 'layer02.attn'; known are 'layer00.attn"):
        llm.apply(Plan.removing(0, 4))
    with pytest.raises(UnknownNameError), llm.applied(Plan.removing("layer99.ffn")):
        pytest.fail("the mask should not have been applied")
    assert llm.plan == Plan.removing(1)
    assert torch.equal(logits(llm), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_of_blocks_and_base_add_up_to_the_unique_tensors(name: str) -> None:
    llm = tiny_llm(name)
    unique = {p.data_ptr(): p.nbytes for p in llm.model.parameters()}
    for module in llm.model.modules():
        kept = set(module.state_dict(keep_vars=True))
        unique |= {
            b.data_ptr(): b.nbytes for n, b in module.named_buffers(recurse=False) if n in kept
        }
    facts = llm.facts
    assert sum(facts.block_param_bytes) + facts.base_bytes == sum(unique.values())
    for index, size in enumerate(facts.block_param_bytes):
        with llm.applied(Plan.removing(index)):
            left = {p.data_ptr(): p.nbytes for p in llm.model.parameters()}
        assert size == sum(unique.values()) - sum(left.values()) > 0


def test_a_tensor_tied_across_blocks_belongs_to_neither() -> None:
    plain, model = tiny_llm(), tiny_model()
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    tied = ElasticLLM(model, None, name="tied")
    shared = first.down_proj.weight.nbytes
    assert tied.facts.block_param_bytes[1] == plain.facts.block_param_bytes[1] - shared
    assert tied.facts.block_param_bytes[3] == plain.facts.block_param_bytes[3] - shared
    assert tied.facts.base_bytes == plain.facts.base_bytes + shared


class TestFingerprint:
    def test_equal_models_agree_under_any_mask(self) -> None:
        llm = tiny_llm()
        llm.apply(MASKS["everything"])
        assert llm.fingerprint == tiny_llm().fingerprint == llm.facts.fingerprint
        assert llm.plan == MASKS["everything"]

    def test_the_fingerprint_depends_on_weights_dtype_config_and_family(self) -> None:
        one_value = tiny_model()
        with torch.no_grad():
            one_value.model.norm.weight[3] += 1e-6
        other_config = tiny_model()
        other_config.config.rms_norm_eps *= 2
        retyped = tiny_model("mistral")
        randomise(retyped)
        models = [tiny_model(), one_value, other_config, tiny_model(dtype=torch.bfloat16), retyped]
        prints = {ElasticLLM(model, None, name="same").fingerprint for model in models}
        assert len(prints) == len(models)


PLAN = Plan.of({"layer00.cache": "int4", "layer01.ffn": "removed"})


def test_a_plan_is_restored_after_a_with_block() -> None:
    llm = tiny_llm()
    llm.apply(PLAN)
    before = logits(llm)
    uniform = Plan.uniform(LAYERS, caches="int2")
    with llm.applied(uniform) as same, llm.without({2}):
        assert same is llm
        assert llm.plan == uniform.without(2)
        assert not torch.equal(logits(llm), before)
    assert llm.plan == PLAN
    assert torch.equal(logits(llm), before)


def test_the_first_and_the_last_layer_run_alone() -> None:
    llm = tiny_llm(layers=4)
    llm.apply(Plan.removing(0))
    before = logits(llm)
    with llm.applied(Plan.removing(0, 2, 3, 4, 5)):
        expected = logits(llm)
    with llm.end_layers():
        assert torch.equal(logits(llm), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(llm), before)
