"""Int4 weights made with a text: for all families, at every residency, read again from files."""

from pathlib import Path

import pytest
import torch

from rap_env.models.live import calibration
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from tests import tiny
from tests.models.states import damage_file, logits

WINDOWS = torch.randint(3, tiny.VOCAB_SIZE, (24, 16), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(3, tiny.VOCAB_SIZE, (16, 16), generator=torch.Generator().manual_seed(1))
INT4 = Plan.uniform(tiny.LAYERS, weights="int4")


def _logits(llm: ElasticLLM, plan: Plan) -> torch.Tensor:
    with llm.applied(plan):
        return logits(llm, input_ids=OTHERS, attention_mask=None, use_cache=False)


def _error(llm: ElasticLLM) -> float:
    native = _logits(llm, Plan())
    return float((_logits(llm, INT4) - native).square().mean())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outputs_on_another_text_come_closer(family: str) -> None:
    llm = tiny.tiny_llm(family)
    native, facts = _logits(llm, Plan()), llm.facts
    before = _error(llm)
    calibrate(llm, WINDOWS)
    assert _error(llm) < 0.95 * before  # experts are not calibrated
    assert torch.equal(_logits(llm, Plan()), native)
    assert llm.plan == Plan()
    assert llm.facts.level_param_bytes == facts.level_param_bytes
    assert llm.facts.identity != facts.identity


def test_later_processes_read_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (tiny.tiny_llm("llama") for _ in range(3))
    calibrate(first, WINDOWS)
    expected = _logits(first, INT4)
    monkeypatch.setattr(calibration, "quantise_gptq", lambda *_, **__: pytest.fail("made again"))
    calibrate(second, WINDOWS)
    assert torch.equal(_logits(second, INT4), expected)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        calibrate(third, WINDOWS[:8])


def test_damaged_files_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path))
    first, second = tiny.tiny_llm("llama"), tiny.tiny_llm("llama")
    calibrate(first, WINDOWS)
    (path, *_) = sorted(tmp_path.rglob("*.safetensors"))
    damage_file(path, "changed")
    calibrate(second, WINDOWS)
    assert torch.equal(_logits(second, INT4), _logits(first, INT4))


@pytest.mark.parametrize("residency", ["resident", "offload"])
def test_all_residencies_use_the_calibrated_weights(residency: str) -> None:
    resident, llm = tiny.tiny_llm("llama"), tiny.tiny_llm("llama")
    calibrate(resident, WINDOWS)
    llm.set_residency(residency)  # type: ignore[arg-type]
    _logits(llm, INT4)  # makes the level without a text
    calibrate(llm, WINDOWS)
    assert llm.residency == residency
    for _ in range(2):  # the second time read from a file
        assert torch.equal(_logits(llm, INT4), _logits(resident, INT4))
    llm.apply(INT4)
    llm.apply(Plan())
    assert torch.equal(_logits(llm, INT4), _logits(resident, INT4))
