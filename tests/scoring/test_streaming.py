import bisect
import contextlib

import pytest
import torch
import transformers as tf

from benchmarks.measuring import measured_peak
from rap_env.errors import InvalidRequestError, UnsupportedModelError
from rap_env.importance.gsi_search import gsi
from rap_env.models.files.loading import load_llm
from rap_env.models.files.streamed import stream_llm
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer
from tests.scoring.removals import scan
from tests.tiny import (
    DISTINCT_FAMILIES,
    VOCAB_SIZE,
    each_family,
    randomise,
    tiny_model,
    tiny_tokenizer,
)

CPU = torch.device("cpu")
ENOUGH = 2**21
MASKS = [Plan(), Plan.removing(0, 1), Plan.removing(0, 2), Plan.removing(0, 3), Plan.removing(3),
         Plan.removing(1, 2), Plan.removing(0, 1, 2, 3)]  # fmt: skip


def tokens(windows=3, length=9, vocabulary=VOCAB_SIZE):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (windows, length), generator=generator)


def save(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def wide_model(dtype, layers=8):
    """Layers that outweigh embeddings, head and hidden states by far."""
    config = tf.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model)
    return model


def pair(folder, dtype="float32", cap=ENOUGH):
    """The same model in memory and streamed."""
    streamed = stream_llm(folder, device="cpu", dtype=dtype, max_memory_bytes=cap)
    return load_llm(folder, device="cpu", dtype=dtype), streamed


def cap_for(folder, ids, masks, dtype="float32"):
    """A cap that lets about so many masks advance together."""
    llm = stream_llm(folder, device="cpu", dtype=dtype, max_memory_bytes=2**30)
    caps = range(2**30 - llm.spare_bytes, 2**30, 2**10)

    def enough(cap):
        llm.max_memory_bytes = cap
        with contextlib.suppress(InvalidRequestError):
            return MaskScorer(llm, ids).in_flight >= masks
        return False

    return caps[bisect.bisect_left(caps, True, key=enough)]


@each_family("family", DISTINCT_FAMILIES, dtype=["float32", "bfloat16"])
def test_scores_are_bit_for_bit_those_of_the_model_in_memory(family, dtype, tmp_path):
    folder, ids = save(tmp_path / "m", tiny_model(family)), tokens()
    whole, streamed = pair(folder, dtype, cap_for(folder, ids, 2, dtype))
    ours, theirs = MaskScorer(streamed, ids), MaskScorer(whole, ids)
    assert ours.in_flight < len(MASKS)
    assert ours.context == theirs.context
    assert ours.nll_many(MASKS) == theirs.nll_many(MASKS)
    assert scan(ours, Plan.removing(1)) == scan(theirs, Plan.removing(1))
    assert MaskScorer(streamed, ids).nll(MASKS[1]) == theirs.nll(MASKS[1])


@pytest.mark.parametrize("method", ["exact", "lazy"])
def test_gsi_finds_the_same_order(method, tmp_path):
    folder, ids = save(tmp_path / "m", tiny_model(layers=4)), tokens(windows=8)
    whole, streamed = pair(folder, cap=cap_for(folder, ids, 3))
    ours = gsi(MaskScorer(streamed, ids), method=method, stop=4, progress=False)
    theirs = gsi(MaskScorer(whole, ids), method=method, stop=4, progress=False)
    assert (ours.order, ours.nll_after) == (theirs.order, theirs.nll_after)
    assert ours.provenance == theirs.provenance


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("float32", "scan"),
        pytest.param("bfloat16", "lazy", marks=pytest.mark.slow),
    ],
)
def test_the_measured_peak_stays_under_the_cap(dtype, how, tmp_path):
    model = wide_model(getattr(torch, dtype))
    folder, ids = save(tmp_path / "m", model), tokens(windows=4, length=16, vocabulary=256)
    cap = cap_for(folder, ids, 5, dtype)
    assert sum(p.nbytes for p in model.parameters()) > 2 * cap
    whole, streamed = pair(folder, dtype, cap)
    resident = streamed.facts.base_bytes + sum(streamed.facts.block_param_bytes[:2])
    # accelerate maps the file while it reads a tensor, which the profiler counts as allocated
    mapped = (folder / "model.safetensors").stat().st_size
    with measured_peak(CPU) as measured:
        scorer = MaskScorer(streamed, ids)
        found = _measure(scorer, how)
    assert found == _measure(MaskScorer(whole, ids), how)
    assert resident + measured.peak_bytes - mapped <= cap


def _measure(scorer, how):
    if how == "scan":
        return scan(scorer, Plan.removing(3))
    profile = gsi(scorer, method=how, stop=2, progress=False)
    return profile.order_indices, profile.nll_after


def test_too_small_a_cap_raises_an_error_with_the_needed_bytes(tmp_path):
    folder, ids = save(tmp_path / "m", tiny_model()), tokens()
    least = cap_for(folder, ids, 1)
    _, streamed = pair(folder, cap=least - 2**11)
    with pytest.raises(
        InvalidRequestError, match=r"max_memory_bytes leaves [\d,]+ bytes besides .*, but one"
    ):
        MaskScorer(streamed, ids)


def test_the_model_writes_its_calibration_text_while_streamed(tmp_path):
    whole, streamed = pair(save(tmp_path / "m", tiny_model()))
    config = CorpusConfig(windows=2, window_tokens=6)
    corpus = load_corpus(config, streamed, progress=False)
    # From the cache: the other model needs not write, and this one needs not again.
    assert torch.equal(load_corpus(config, whole, progress=False).tokens, corpus.tokens)
    assert torch.equal(load_corpus(config, streamed, progress=False).tokens, corpus.tokens)


def test_plans_of_caches_score_as_in_memory_and_lowered_weights_are_rejected(tmp_path):
    whole, streamed = pair(save(tmp_path / "m", tiny_model("llama_tied")))
    ids = tokens(2, 50)
    plans = [Plan.uniform(2, caches=level) for level in ("int8", "int2")]
    plans += [plan.without(1) for plan in plans]
    assert MaskScorer(streamed, ids).nll_many(plans) == MaskScorer(whole, ids).nll_many(plans)
    with pytest.raises(UnsupportedModelError, match="no other levels"):
        MaskScorer(streamed, ids).nll(Plan.of({"layer00.ffn": "int4"}))
