"""The tiny models of the package: what their record says, and whole passes that score them."""

import json

import numpy as np
import pytest
import torch
import transformers

from rap_env.leaderboard.unseen import PARTS
from rap_env.models.files.loading import load_llm, shared_llm
from rap_env.models.files.sources import TINY_MODELS, locate
from rap_env.models.files.zoo import TINY, save_rounded
from rap_env.models.live.lean_llama import LeanLlama
from rap_env.paths import folder_bytes
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tools import tiny_models

RECORD = json.loads((TINY / "record.json").read_text(encoding="utf-8"))
TEXT = CorpusConfig(source="tiny-held-out", windows=8, window_tokens=128, role="report")


def recipe(name):
    return tiny_models.Recipe(**RECORD[name]["recipe"])


LOADED = [*TINY_MODELS[:6], "zoo-02", "zoo-12", "zoo-25", "zoo-54"]


@pytest.mark.parametrize("name", LOADED)
def test_a_model_is_the_one_of_the_record(name):
    llm, noted = load_llm(name, device="cpu", dtype="float32"), RECORD[name]
    recipe = noted["recipe"]
    assert llm.fingerprint == noted["fingerprint"]
    assert llm.num_blocks == 2 * recipe["layers"]
    assert sum(weight.numel() for weight in llm.model.parameters()) == noted["parameters"]
    assert folder_bytes(locate(name).folder) <= 4_000_000
    assert llm.model.config.model_type == recipe["family"]
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    ids = tiny_models.encoded(llm.tokenizer, [text])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        assert float(tiny_models.nll(llm.model, windows)) == pytest.approx(
            noted["held_out_nll"], abs=1e-3
        )
    counts = np.bincount(ids.numpy(), minlength=512) + 1
    unigram_nll = float(-np.log(counts / counts.sum())[ids.numpy()].mean())
    assert noted["held_out_nll"] < 0.7 * unigram_nll


def test_the_held_out_text_is_what_the_program_writes_and_was_not_trained_on():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / TINY_MODELS[0])
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    assert text == tiny_models.held_out_text(tokenizer)
    seen = tiny_models.written(held_out=False)
    assert seen
    assert all(part in text for part in tiny_models.written(held_out=True))
    assert not any(part in text for part in seen)


def test_training_again_gives_the_same_weights():
    stream = torch.arange(2_000) % tiny_models.VOCABULARY
    models = [tiny_models.make_model(recipe("tiny-narrow")) for _ in range(2)]
    before = models[0].lm_head.weight.clone()
    for model in models:
        tiny_models.train(model, [stream, stream], steps=2, seed=0)
    assert not torch.equal(before, models[0].lm_head.weight)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_the_zoo_has_three_families_one_of_which_is_only_in_the_test_part():
    models = [set(models) for models in PARTS.values()]
    assert [len(part) for part in models] == [44, 4, 16]
    assert set.union(*models) == set(TINY_MODELS) == set(RECORD)
    families = [{RECORD[name]["recipe"]["family"] for name in part} for part in models]
    assert families == [{"llama", "qwen2"}, {"llama", "qwen2"}, {"llama", "qwen2", "gpt_neox"}]
    layers = [RECORD[name]["recipe"]["layers"] for name in RECORD]
    assert (min(layers), max(layers)) == (3, 12)
    assert sum(path.stat().st_size for path in (TINY / "zoo").iterdir()) < 7_000_000
    assert sum(entry["cpu_s"] for entry in RECORD.values()) < 7_200


def test_a_rounded_file_gives_the_same_model_up_to_rounding(tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_models.make_model(recipe("zoo-25"))
    path = TINY / "zoo" / "zoo-25.safetensors.xz"
    original = path.read_bytes()
    try:
        save_rounded(model, "zoo-25")
        loaded = load_llm("zoo-25", device="cpu", dtype="float32").model.state_dict()
    finally:
        path.write_bytes(original)
    for name, weight in model.state_dict().items():
        steps = weight.abs().amax(dim=-1, keepdim=True) / 11
        assert ((loaded[name] - weight).abs() <= 0.51 * steps + 0.01 * weight.abs()).all(), name


def test_plans_of_a_lean_model_run_together_with_the_scores_of_each_alone():
    torch.set_num_threads(1)
    lean = shared_llm("tiny-wide", device="cpu", dtype="float32")
    other = load_llm("tiny-wide", device="cpu", dtype="float32")
    assert isinstance(lean.model, LeanLlama)
    assert not isinstance(other.model, LeanLlama)
    plans = [
        Plan(),
        Plan.removing("layer01.attn", "layer02.ffn"),
        Plan.of({"layer00.ffn": "int2", "layer03.attn": "int4-compact"}),
        Plan.of({"layer02.attn": "removed", "layer02.ffn": "int2", "embeddings": "int4-compact"}),
        Plan.of({"layer01.cache": "int2", "layer03.attn": "int4-compact"}),
    ]
    together, steps = (PlanScorer(llm, load_corpus(TEXT, llm)) for llm in (lean, other))
    alone = PlanScorer(lean, load_corpus(TEXT, lean), masks_together=1)
    values = np.array([scorer.nll_many(plans) for scorer in (together, steps, alone)])
    np.testing.assert_allclose(values[0], values[1], atol=2e-6)
    np.testing.assert_allclose(values[0], values[2], atol=2e-6)
    assert lean.plan == Plan()
    assert alone.block_forwards == sum(8 - len(plan.removed) for plan in plans)
    assert together.block_forwards < alone.block_forwards
    assert len(set(values[0].round(4))) == len(plans)
