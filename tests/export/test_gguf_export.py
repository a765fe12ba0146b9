"""GGUF files for llama.cpp hold the model under the plan; read and computed without llama.cpp."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from rap_env.errors import StorageFullError, UnknownNameError, UnsupportedModelError
from rap_env.export.gguf_export import GgufModel, export_gguf, low_bit_tensors
from rap_env.models.files.gguf_conversion import GgufFile
from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.plan import Plan
from tests.export.deci_forward import deci_logits
from tests.models.tiny_gguf import write_tiny_gguf

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
    with llm.applied(plan), torch.no_grad():
        return llm.model(IDS[None]).logits[0].double()


def source(path: Path, **options: Any) -> tuple[ElasticLLM, GgufModel]:
    """A tiny Llama, and its GGUF file for the export."""
    model = write_tiny_gguf(path / "in.gguf", **options)
    return ElasticLLM(model, None, name="source"), GgufModel.of_file(path / "in.gguf")


@pytest.mark.parametrize("removed", MASKS.values(), ids=MASKS)
def test_the_file_is_the_masked_model(removed, tmp_path):
    (llm, model), plan = source(tmp_path, layers=LAYERS), Plan.removing(*removed)
    path = tmp_path / "a.gguf"
    export_gguf(model, plan, path)
    torch.testing.assert_close(deci_logits(path, IDS), masked_logits(llm, plan), rtol=0, atol=1e-5)


@pytest.mark.engine_feature("llama.cpp", "Families", "GGUF files of architecture `llama`")
@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_and_own_heads(tied, tmp_path):
    (llm, model), plan = source(tmp_path, layers=LAYERS, tied=tied), Plan.removing(0, 3, 5, 6)
    path = tmp_path / "a.gguf"
    export_gguf(model, plan, path)
    torch.testing.assert_close(deci_logits(path, IDS), masked_logits(llm, plan), rtol=0, atol=1e-5)
    names = {tensor.name for tensor in GgufFile(path).tensors}
    assert ("output.weight" in names) == (not tied)


@pytest.mark.engine_feature(
    "llama.cpp", "Levels of weights", "int8 as `Q8_0`, int4 as `Q4_1`; those of a GGUF source"
)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
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


@pytest.mark.engine_feature(
    "llama.cpp", "Levels of weights", "int8 as `Q8_0`, int4 as `Q4_1`; those of a GGUF source"
)
@pytest.mark.parametrize(("level", "kind"), [("int8", Kind.Q8_0), ("int4", Kind.Q4_1)])
def test_levels_hold_the_values_of_the_live_levels(level, kind, tmp_path):
    (llm, model), path = source(tmp_path, hidden=64, ffn=96), tmp_path / "a.gguf"
    levels = {"layer00.ffn": level, "layer01.attn": level, "embeddings": level}
    plan = Plan.of({**levels, "layer00.attn": "removed"})
    export_gguf(model, plan, path)
    kinds = {t.name: t.tensor_type for t in GgufFile(path).tensors}
    assert {
        kinds[n] for n in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight", "token_embd.weight")
    } == {kind}
    assert kinds["blk.1.ffn_up.weight"] == kinds["blk.0.ffn_norm.weight"] == Kind.F32
    ours, native = masked_logits(llm, plan), masked_logits(llm, Plan(plan.removed))
    apart = (deci_logits(path, IDS) - ours).abs().max()
    assert apart < 0.02 * (native - ours).abs().max()  # float16 in place of bfloat16 scales


@pytest.mark.parametrize(("kind", "weights"), [("F32", "bf16"), ("Q4_1", "native")])
def test_levels_of_few_bits_are_q4_1_with_the_values_of_the_live_levels(kind, weights, tmp_path):
    _, model = source(tmp_path, kind=kind, hidden=64, ffn=128)
    llm = load_llm(tmp_path / "in.gguf", weights=weights, dtype="float32", device="cpu")
    calibrate(llm, IDS[None])
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
        with llm.applied(plan):
            wide = {
                "blk.0.ffn_down.weight": llm.model.model.layers[0].mlp.down_proj.widened().weight,
                "blk.1.attn_v.weight": llm.model.model.layers[1].self_attn.v_proj.widened().weight,
            }
        for name, weight in wide.items():
            values = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type))
            # Scales are rounded; int2 is rounded again, but not v, which has int4 in place of it.
            most = 0.1 if level == "int2" and "ffn" in name else 3e-3
            assert (values - weight).abs().max() < most * weight.abs().max(), (level, name)
        if kind == "F32":  # the live native tensors of a file have scales of fewer bits
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


def test_rows_that_are_no_multiple_of_32_have_no_levels(tmp_path):
    (_, model), plan = source(tmp_path, hidden=48), Plan.of({"layer01.ffn": "int4"})
    with pytest.raises(UnsupportedModelError, match="blk.1.ffn_gate.weight has rows of 48 values"):
        export_gguf(model, plan, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.engine_feature("llama.cpp", "Removed blocks", "any, if an attention block is kept")
def test_a_model_without_attention_is_refused(tmp_path):
    (_, model), everything = source(tmp_path), Plan.removing(0, 2)
    with pytest.raises(UnsupportedModelError, match="without any attention block"):
        export_gguf(model, everything, tmp_path / "a.gguf")


@pytest.mark.engine_feature("llama.cpp", "Levels of caches", "one format for all layers")
def test_caches_of_several_levels_and_unknown_blocks_are_refused(tmp_path):
    (_, model), path = source(tmp_path), tmp_path / "a.gguf"
    with pytest.raises(UnsupportedModelError, match="in one format.*but the plan has int4, native"):
        export_gguf(model, Plan.of({"layer00.cache": "int4"}), path)
    with pytest.raises(UnsupportedModelError, match="but the plan has window512"):
        export_gguf(model, Plan.uniform(2, caches="window512"), path)
    with pytest.raises(UnknownNameError, match=r"layer05\.ffn"):
        export_gguf(model, Plan.removing("layer05.ffn"), path)
    export_gguf(model, Plan.uniform(2, caches="int8"), path)


def test_other_gguf_architectures_are_refused(tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", architecture="gemma3")
    with pytest.raises(UnsupportedModelError, match="gemma3.* is none; known are llama"):
        GgufModel.of_file(tmp_path / "in.gguf")


def test_a_failed_export_leaves_the_older_file(tmp_path, monkeypatch):
    (_, model), path = source(tmp_path), tmp_path / "out" / "a.gguf"
    path.parent.mkdir()
    path.write_bytes(b"older")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(StorageFullError):
        export_gguf(model, Plan(), path)
    assert path.read_bytes() == b"older"
    assert list(path.parent.iterdir()) == [path]
