"""GGUF files for llama.cpp hold the model under the plan; read and computed without llama.cpp."""

from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rap_env.errors import StorageFullError, UnknownNameError, UnsupportedModelError
from rap_env.export.gguf_export import export_gguf
from rap_env.export.gguf_model import GgufModel, low_bit_tensors
from rap_env.export.gguf_tokenizer import tokenizer_entries
from rap_env.models.families.placeholders import Stub
from rap_env.models.files.gguf_reader import GgufFile
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_code import LLAMA_LIKE
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.packed_layout import LOW_BIT_FORMATS
from rap_env.plan import Plan
from tests.export.deci_forward import deci_logits
from tests.models.tiny_gguf import tiny_source_model, write_tiny_gguf
from tests.tiny import FAMILIES as TINY
from tests.tiny import randomise, tiny_config, tiny_llm, tiny_tokenizer

LAYERS = 4
IDS = torch.arange(3, 27)
MASKS = {
    "nothing": (),
    "first attention": (0,),
    "first FFN": (1,),
    "last attention": (2 * LAYERS - 2,),
    "last FFN": (2 * LAYERS - 1,),
    "attention only": (0, 4),
    "FFN only": (1, 3),
    "first layer": (0, 1),
    "last layer": (6, 7),
    "alternating": (0, 3, 5, 7),
    "all FFN": (1, 3, 5, 7),
    "all but one attention": (0, 1, 2, 3, 5, 6, 7),
}
"""Removed blocks of a model with four layers, by what they are."""


def masked_logits(llm: ElasticLLM, plan) -> torch.Tensor:
    with llm.masked(plan), torch.no_grad():
        return llm.model(IDS[None]).logits[0].double()


def check_file(llm: ElasticLLM, plan: Plan, path, atol: float = 1e-5) -> set[str]:
    """Export, and compare with the masked model what the file computes; gives its tensors."""
    export_gguf(GgufModel.of_llm(llm), plan, path)
    torch.testing.assert_close(deci_logits(path, IDS), masked_logits(llm, plan), rtol=0, atol=atol)
    return {tensor.name for tensor in GgufFile(path).tensors}


@pytest.mark.parametrize("removed", MASKS.values(), ids=MASKS)
def test_the_file_is_the_masked_model(removed, tmp_path):
    check_file(tiny_llm(layers=LAYERS), Plan.removing(*removed), tmp_path / "a.gguf")


@pytest.mark.engine_feature("llama.cpp", "Families", "Llama, Mistral, Qwen2")
@pytest.mark.parametrize("name", ["llama_tied", "mistral", "qwen2"])
def test_further_families_with_biases_and_tied_heads(name, tmp_path):
    llm, plan = tiny_llm(name, layers=LAYERS), Plan.removing(0, 3, 5, 6)
    names = check_file(llm, plan, tmp_path / "a.gguf")
    assert ("output.weight" in names) == (name != "llama_tied")


@pytest.mark.engine_feature("llama.cpp", "Families", "Llama, Mistral, Qwen2")
@pytest.mark.parametrize("name", [n for n in TINY if tiny_config(n).model_type not in LLAMA_LIKE])
def test_other_families_are_refused_by_name(name, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=rf"tiny-{name} \(\w+\) is none; known are llama"
    ):
        GgufModel.of_llm(tiny_llm(name))


SCALED = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 2.0},
}  # fmt: skip


def scaled_llm(kind: str) -> ElasticLLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 100.0, **SCALED[kind]},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    randomise(model)
    return ElasticLLM(model, None, name="scaled")


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_positions_are_carried_over(kind, tmp_path):
    names = check_file(scaled_llm(kind), Plan.removing(1), tmp_path / "a.gguf", atol=1e-4)
    assert "rope_freqs.weight" in names


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(tiny_llm, "mistral_sliding"), "has a sliding window of 5 tokens"),
        (partial(tiny_llm, "qwen2_sliding"), "has a sliding window of 5 tokens"),
        (partial(scaled_llm, "yarn"), "default, linear, llama3.*silu and yarn"),
        (lambda: tiny_llm(tokenizer=tiny_tokenizer()), r"The tokenizer \(WordLevel with Split\)"),
    ],
)
def test_models_without_counterpart_are_refused(make, words):
    with pytest.raises(UnsupportedModelError, match=words):
        GgufModel.of_llm(make())


def source_llm(**sizes) -> ElasticLLM:
    return ElasticLLM(tiny_source_model(hidden=64, ffn=96, **sizes), None, name="source")


@pytest.mark.engine_feature(
    "llama.cpp", "Levels of weights", "int8 as `Q8_0`, int4 as `Q4_1`; those of a GGUF source"
)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_tensors_of_a_gguf_file_are_copied_as_they_are(kind, tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", kind=kind, hidden=64, ffn=96)
    path, plan = tmp_path / "a.gguf", Plan.removing(1, 2)
    export_gguf(GgufModel.of_file(tmp_path / "in.gguf"), plan, path)
    before = {t.name: t for t in GgufFile(tmp_path / "in.gguf").tensors}
    after = {t.name: t for t in GgufFile(path).tensors}
    assert after.keys() == before.keys() - {f"blk.{n}.{p}.weight" for n, parts in
        ((1, ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
              "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")),) for p in parts}  # fmt: skip
    for name, tensor in after.items():
        # The only kept attention and the only kept FFN block become one layer.
        source = name.replace("blk.0.ffn", "blk.1.ffn")
        assert tensor.tensor_type == before[source].tensor_type
        assert np.array_equal(tensor.data, before[source].data)


def test_header_tokenizer_and_template_of_a_gguf_file_are_carried_over(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", kind="Q4_1", hidden=64, ffn=96)
    path = tmp_path / "a.gguf"
    export_gguf(GgufModel.of_file(tmp_path / "in.gguf"), Plan.removing(1), path)
    before, after = GgufFile(tmp_path / "in.gguf"), GgufFile(path)
    for name, field in before.fields.items():
        if name.startswith("llama."):
            name = name.replace("llama.", "deci.")
            if name.endswith(("head_count", "head_count_kv", "feed_forward_length")):
                continue
        elif name == "general.architecture":
            continue
        assert after.fields[name].contents() == field.contents(), name
        assert after.fields[name].types == field.types, name
    assert after.value("deci.attention.key_length") == 16
    assert after.value("tokenizer.chat_template")


def test_a_gguf_file_and_its_model_give_the_same_file(tmp_path):
    model = write_tiny_gguf(tmp_path / "in.gguf", hidden=64, ffn=96)
    plan, llm = Plan.removing(0), ElasticLLM(model, None, name="source")
    export_gguf(GgufModel.of_file(tmp_path / "in.gguf"), plan, tmp_path / "a.gguf")
    export_gguf(GgufModel.of_llm(llm), plan, tmp_path / "b.gguf")
    a, b = ({t.name: t.data for t in GgufFile(tmp_path / f"{n}.gguf").tensors} for n in "ab")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.engine_feature(
    "llama.cpp", "Levels of weights", "int8 as `Q8_0`, int4 as `Q4_1`; those of a GGUF source"
)
@pytest.mark.parametrize(("level", "kind"), [("int8", Kind.Q8_0), ("int4", Kind.Q4_1)])
def test_levels_hold_the_values_of_the_live_levels(level, kind, tmp_path):
    llm, path = source_llm(), tmp_path / "a.gguf"
    levels = {"layer00.ffn": level, "layer01.attn": level, "embeddings": level}
    plan = Plan.of({**levels, "layer00.attn": "removed"})
    export_gguf(GgufModel.of_llm(llm), plan, path)
    kinds = {t.name: t.tensor_type for t in GgufFile(path).tensors}
    assert {
        kinds[n] for n in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight", "token_embd.weight")
    } == {kind}
    assert kinds["blk.1.ffn_up.weight"] == kinds["blk.0.ffn_norm.weight"] == Kind.F32
    ours, native = masked_logits(llm, plan), masked_logits(llm, Plan(plan.removed))
    found = (deci_logits(path, IDS) - ours).abs().max()
    assert found < 0.02 * (native - ours).abs().max()  # float16 in place of bfloat16 scales


@pytest.mark.parametrize("source", ["live", "file"])
def test_levels_of_few_bits_are_q4_1_with_the_values_of_the_live_levels(source, tmp_path):
    path = tmp_path / "in.gguf"
    write_tiny_gguf(path, kind="Q4_1", hidden=64, ffn=128)
    weights = "bf16" if source == "live" else "native"
    llm = load_llm(path, weights=weights, dtype="float32", device="cpu")
    calibrate(llm, IDS[None])
    model = GgufModel.of_llm(llm) if source == "live" else GgufModel.of_file(path)
    for level in LOW_BIT_FORMATS:
        plan = Plan.of({"layer00.attn": "removed", "layer00.ffn": level, "layer01.attn": level})
        with pytest.raises(UnsupportedModelError, match=r"give what low_bit_tensors\(llm, plan\)"):
            export_gguf(model, plan, tmp_path / "a.gguf")
        of_plan = replace(model, low_bits=low_bit_tensors(llm, plan))
        written = export_gguf(of_plan, plan, tmp_path / "a.gguf")
        tensors = {t.name: t for t in GgufFile(tmp_path / "a.gguf").tensors}
        assert sum(map(len, written.values())) == len(tensors)
        assert {t.kind for t in written[level] if t.data.ndim > 1} == {Kind.Q4_1}
        assert len(written[level]) == 4 + 5  # an FFN and an attention block with their norms
        with llm.masked(plan):
            wide = {
                "blk.0.ffn_down.weight": llm.model.model.layers[0].mlp.down_proj.widened().weight,
                "blk.1.attn_v.weight": llm.model.model.layers[1].self_attn.v_proj.widened().weight,
            }
        for name, weight in wide.items():
            values = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type))
            # Scales are rounded; int2 is rounded again, but not v, which has int4 in place of it.
            most = 0.1 if level == "int2" and "ffn" in name else 3e-3
            assert (values - weight).abs().max() < most * weight.abs().max(), (level, name)
        if source == "live":  # the live native tensors of a file have scales of fewer bits
            ours, native = masked_logits(llm, plan), masked_logits(llm, Plan(plan.removed))
            apart = (deci_logits(tmp_path / "a.gguf", IDS) - ours).abs().max()
            lost = (native - ours).abs().max()
            assert apart < (0.4 * lost if level == "int2" else 0.02 * ours.abs().max()), level


def test_what_is_stored_in_as_few_bits_is_kept(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", kind="Q4_1", hidden=64, ffn=96)
    path = tmp_path / "a.gguf"
    plan = Plan.uniform(2, weights="int8", embeddings="int4")
    export_gguf(GgufModel.of_file(tmp_path / "in.gguf"), plan, path)
    kinds = {t.tensor_type for t in GgufFile(path).tensors}
    assert kinds == {Kind.Q4_1, Kind.F32}


def test_bf16_stays(tmp_path):
    llm, path = tiny_llm(dtype=torch.bfloat16), tmp_path / "a.gguf"
    export_gguf(GgufModel.of_llm(llm), Plan(), path)
    for tensor in GgufFile(path).tensors:
        assert tensor.tensor_type == (Kind.F32 if "norm" in tensor.name else Kind.BF16)
    ours = masked_logits(tiny_llm(dtype=torch.bfloat16), Plan())
    torch.testing.assert_close(deci_logits(path, IDS), ours, rtol=0, atol=0.1)


def test_rows_that_are_no_multiple_of_32_have_no_levels(tmp_path):
    plan = Plan.of({"layer01.ffn": "int4"})
    with pytest.raises(UnsupportedModelError, match="blk.1.ffn_gate.weight has rows of 16 values"):
        export_gguf(GgufModel.of_llm(tiny_llm()), plan, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_means_become_biases(tmp_path):
    llm, path = tiny_llm("llama_tied", layers=LAYERS), tmp_path / "a.gguf"
    generator = torch.Generator().manual_seed(0)
    means = {n: torch.randn(16, generator=generator) for n in (2, 3, 5, 7)}
    stubs = {n: Stub(torch.zeros(0, 16), torch.zeros(16, 0), mean) for n, mean in means.items()}
    mask = Plan.removing(*means)
    export_gguf(GgufModel.of_llm(llm), mask, path, {n: m.numpy() for n, m in means.items()})
    ours = masked_logits(llm.repaired(stubs, "means"), mask)
    assert (ours - masked_logits(llm, mask)).abs().max() > 0.1
    torch.testing.assert_close(deci_logits(path, IDS), ours, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="adds its mean before any kept block"):
        export_gguf(GgufModel.of_llm(llm), Plan.removing(0), path, {0: means[2]})


@pytest.mark.engine_feature("llama.cpp", "Removed blocks", "any, if an attention block is kept")
def test_a_model_without_attention_is_refused(tmp_path):
    everything = Plan.removing(*range(0, 2 * LAYERS, 2))
    with pytest.raises(UnsupportedModelError, match="without any attention block"):
        export_gguf(GgufModel.of_llm(tiny_llm(layers=LAYERS)), everything, tmp_path / "a.gguf")


@pytest.mark.engine_feature("llama.cpp", "Levels of caches", "one format for all layers")
def test_caches_of_several_levels_and_unknown_blocks_are_refused(tmp_path):
    model, path = GgufModel.of_llm(tiny_llm()), tmp_path / "a.gguf"
    with pytest.raises(UnsupportedModelError, match="in one format.*but the plan has int4, native"):
        export_gguf(model, Plan.of({"layer00.cache": "int4"}), path)
    with pytest.raises(UnsupportedModelError, match="but the plan has window512"):
        export_gguf(model, Plan.uniform(2, caches="window512"), path)
    with pytest.raises(UnknownNameError, match=r"layer05\.ffn"):
        export_gguf(model, Plan.removing("layer05.ffn"), path)
    export_gguf(model, Plan.uniform(2, caches="int8"), path)


def test_other_gguf_architectures_are_refused(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", architecture="gemma3")
    with pytest.raises(
        UnsupportedModelError, match=r"in\.gguf \(gemma3\) is none; known are llama"
    ):
        GgufModel.of_file(tmp_path / "in.gguf")


def test_a_failed_export_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"older")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(StorageFullError):
        export_gguf(GgufModel.of_llm(tiny_llm()), Plan(), path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_is_written_as_llama_cpp_writes_it(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf")
    llm = load_llm(tmp_path / "in.gguf", weights="bf16", dtype="float32", device="cpu")
    export_gguf(GgufModel.of_llm(llm), Plan.removing(1), tmp_path / "a.gguf")
    before, after = GgufFile(tmp_path / "in.gguf"), GgufFile(tmp_path / "a.gguf")
    names = {name for name in before.fields if name.startswith("tokenizer.")}
    found = {name for name in after.fields if name.startswith("tokenizer.")}
    assert found == names | {"tokenizer.ggml.add_bos_token"}
    for name in names:
        assert after.fields[name].contents() == before.fields[name].contents(), name
        assert after.fields[name].types == before.fields[name].types, name


def test_missing_tokens_are_padded_and_added_ones_have_types():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_tokens("plain")
    entries = {name: value for name, (value, _, _) in tokenizer_entries(tokenizer, 7).items()}
    assert entries["tokenizer.ggml.pre"] == "gpt-2"
    texts = ["a", "b", "ab", "<end>", "plain", "[PAD5]", "[PAD6]"]
    assert entries["tokenizer.ggml.tokens"] == texts
    assert entries["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 4, 5, 5]
    assert entries["tokenizer.ggml.eos_token_id"] == 3
    assert "tokenizer.ggml.bos_token_id" not in entries
    with pytest.raises(
        UnsupportedModelError, match="has 5 tokens and the model's embeddings 4 rows"
    ):
        tokenizer_entries(tokenizer, 4)
