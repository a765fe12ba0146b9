"""llama.cpp itself computes the model under the plan, where its bindings are installed."""

import numpy as np
import pytest
import torch

from experiments.llama_cpp import PACKAGE, VERSION, LlamaCpp
from rap_env.export.gguf_export import export_gguf
from rap_env.plan import Plan
from tests.export.test_gguf_export import IDS, LAYERS, MASKS, masked_logits, source

pytest.importorskip("llama_cpp_py_sync", reason=f"llama.cpp: pip install {PACKAGE}=={VERSION}")

NEW_TOKENS = 24


def engine_logits(path) -> torch.Tensor:
    """Logits (T, V) of `IDS` with a cache in float32."""
    engine = LlamaCpp(str(path), "f32", 1, 64, 1)
    actual = engine.decode(IDS.numpy().astype(np.int32), 0, all_logits=True).copy()
    engine.close()
    return torch.from_numpy(actual).double()


def greedy(path, prompt: list[int]) -> list[int]:
    """New tokens after a prompt, one at a time."""
    engine = LlamaCpp(str(path), "f32", 1, 64, 1)
    ids, at, actual = np.array(prompt, dtype=np.int32), 0, []
    for _ in range(NEW_TOKENS):
        logits = engine.decode(ids, at, all_logits=False)
        at += len(ids)
        ids = np.array([logits[0].argmax()], dtype=np.int32)
        actual.append(int(ids[0]))
    engine.close()
    return actual


@pytest.mark.engine_feature("llama.cpp", "Removed blocks", "any, if an attention block is kept")
@pytest.mark.parametrize("removed", MASKS.values(), ids=MASKS)
def test_logits_and_greedy_tokens_are_those_of_the_masked_model(removed, tmp_path):
    (llm, model), path = source(tmp_path, layers=LAYERS), tmp_path / "a.gguf"
    plan = Plan.removing(*removed)
    export_gguf(model, plan, path)
    torch.testing.assert_close(engine_logits(path), masked_logits(llm, plan), rtol=0, atol=1e-5)
    prompt = IDS[:8]
    with llm.applied(plan):
        ours = llm.generate(
            prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    assert greedy(path, prompt.tolist()) == ours[0, 8:].tolist()


@pytest.mark.engine_feature("llama.cpp", "Families", "GGUF files of architecture `llama`")
def test_a_head_of_its_own(tmp_path):
    (llm, model), plan = source(tmp_path, tied=False), Plan.removing(0, 3)
    path = tmp_path / "a.gguf"
    export_gguf(model, plan, path)
    torch.testing.assert_close(engine_logits(path), masked_logits(llm, plan), rtol=0, atol=1e-4)


def test_a_file_with_a_tokenizer_and_quantised_tensors_loads(tmp_path):
    llm, model = source(tmp_path, kind="Q8_0", hidden=64, ffn=96)
    path, plan = tmp_path / "a.gguf", Plan.removing(1, 2)
    export_gguf(model, plan, path)
    actual, ours = engine_logits(path), masked_logits(llm, plan)
    assert (actual - ours).abs().max() < 0.05 * ours.abs().max()  # 8 bits, of inputs too
