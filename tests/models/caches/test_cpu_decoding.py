"""Decoding single tokens with the CPU optimisations equals transformers' own decoding."""

import torch

from rap_env.models.caches.attention import PACKED_ATTENTION, attention_name, speed_up_decoding
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.models.states import saved
from tests.tiny import each_family, tiny_llm, tiny_model


@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_packed_decoding_gives_the_same_logits(name, dtype) -> None:
    plain, packed = tiny_llm(name, dtype=dtype), tiny_llm(name, dtype=dtype)
    speed_up_decoding(packed.model)
    for prompts in ([[5, 9, 14]] * 2, [[5, 9, 14], [7] * 9]):  # without padding, and with
        for mask in (Plan(), Plan.removing(0, 3)):
            actual = []
            for llm in (plain, packed):
                llm.apply(mask)
                batch = LiveBatch(llm)
                batch.prefill(prompts)
                actual.append(torch.stack([batch.extend([n, n + 1]) for n in range(3, 9)]))
            torch.testing.assert_close(
                *actual, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
            )


def test_packed_attention_is_used_only_where_heads_share_keys() -> None:
    for name, taken in (("llama", True), ("gpt2", False), ("gemma2", False)):
        for live in (False, True):
            model = tiny_model(name)
            if live:
                ElasticLLM(model, None, name=name)
            usual = model.config._attn_implementation
            speed_up_decoding(model)
            assert model.config._attn_implementation == (PACKED_ATTENTION if taken else usual)
            assert attention_name(model) == ("eager" if name == "gemma2" else "sdpa")


def test_the_packed_attention_name_is_not_saved(tmp_path) -> None:
    folder = saved(tmp_path / "model", dtype=torch.float32)
    llm = load_llm(folder, dtype="float32", device="cpu")
    assert llm.model.config._attn_implementation == PACKED_ATTENTION
    assert llm.fingerprint == ElasticLLM(tiny_model(), None, name="same").fingerprint
    save_pruned(llm, Plan.removing(1), tmp_path / "pruned")
    written = "".join(
        path.read_text() for path in (tmp_path / "pruned").glob("*.json") if "rap" in path.name
    )
    assert PACKED_ATTENTION not in written
    assert '"sdpa"' in written
    assert load_pruned(tmp_path / "pruned").model.config._attn_implementation == PACKED_ATTENTION
