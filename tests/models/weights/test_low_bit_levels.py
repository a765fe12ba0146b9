"""Levels of few bits in live models: exact bytes, their own weights, exact restoration."""

from pathlib import Path

import pytest
import torch

from rap_env.errors import UnsupportedModelError
from rap_env.memory import MemoryModel
from rap_env.models.live import calibration
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.models.weights.residency import Residency
from rap_env.plan import Plan, block_name
from rap_env.request import Request
from tests.models.states import apply_to, logits, opened, saved, weights_hash
from tests.models.weights.test_weight_levels import replace_by_widened
from tests.tiny import LAYERS, VOCAB_SIZE, WIDE_FAMILIES, tiny_llm, tiny_model

REQUEST = Request(1, 8, 1)
WINDOWS = torch.randint(3, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
UNIFORM = {
    level: Plan.uniform(LAYERS, weights=level, embeddings=level) for level in LOW_BIT_FORMATS
}
MIXED = Plan.of(
    {"layer00.attn": "int3", "layer00.ffn": "int2", "layer01.attn": "int4-compact",
     "layer01.ffn": "removed", "embeddings": "int3", "layer01.cache": "int8"}
)  # fmt: skip

EVERY = pytest.mark.parametrize("name", WIDE_FAMILIES)


def made(llm: ElasticLLM) -> ElasticLLM:
    """A model that makes its levels at their first use."""
    llm.calibrator = lambda model: calibrate(model, WINDOWS)
    return llm


@pytest.mark.engine_feature("here", "Levels of weights", "int8, int4, int3, int2")
@pytest.mark.parametrize("level", UNIFORM)
@EVERY
def test_a_level_computes_with_its_weights_and_is_undone_exactly(name: str, level: str) -> None:
    llm = made(tiny_llm(name))
    native, before = logits(llm), weights_hash(llm.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with llm.applied(UNIFORM[level]):
        packed, written = logits(llm), llm.generate(ids, max_new_tokens=3, do_sample=False)
        reference = tiny_model(name)
        replace_by_widened(reference, llm.model)
    assert not torch.allclose(packed, native, rtol=1e-3, atol=1e-3)
    assert torch.allclose(packed, logits(reference), rtol=1e-4, atol=1e-4)
    assert torch.equal(written, reference.generate(ids, max_new_tokens=3, do_sample=False))
    assert torch.equal(logits(llm), native)
    assert weights_hash(llm.model) == before


@pytest.mark.parametrize(
    ("name", "residency"),
    [("llama_wide", "offload"), ("llama_wide", "drop"), ("gpt_neox_wide", "offload")],
)
def test_every_residency_gives_the_same(name: str, residency: Residency, tmp_path: Path) -> None:
    llm, resident = (made(opened(saved(tmp_path / n, name))) for n in ("a", "b"))
    llm.set_residency(residency)
    memory = MemoryModel(llm)
    for plan in (MIXED, UNIFORM["int3"], Plan(), UNIFORM["int2"].without(0), MIXED):
        apply_to(plan, llm, resident)
        parts = memory.breakdown(plan, REQUEST)
        assert llm.held_bytes.weights == parts.weights + parts.embeddings, str(plan)


def test_without_a_text_they_do_not_exist() -> None:
    llm = tiny_llm("llama_wide")
    with pytest.raises(UnsupportedModelError, match=r"at int3 so far: .* call .*calibrate\(llm"):
        llm.apply(Plan.of({"layer00.ffn": "int3"}))
    assert llm.plan == Plan()


@pytest.mark.parametrize("level", ["int3", "int2"])
@EVERY
def test_the_last_matrix_of_a_block_makes_up_for_the_others(name, level, monkeypatch) -> None:
    windows = torch.randint(3, VOCAB_SIZE, (64, 32), generator=torch.Generator().manual_seed(0))
    others = torch.randint(3, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(1))

    def error() -> float:
        llm = tiny_llm(name)
        calibrate(llm, windows, [level])
        forward, total = PartialForward(llm), 0.0
        for window in others:
            state = forward.enter(window[None])
            for step in forward.steps:
                lowered = Plan.of({block_name(block): level for block in step})
                native = forward.run(step, state)
                total += float((forward.run(step, state, lowered) - native).square().sum())
                state = native
        return total

    corrected = error()
    monkeypatch.setattr(calibration, "_CORRECTED", ())
    monkeypatch.setattr(calibration, "_VERSION", 0)  # other files
    assert corrected < 0.99 * error()
