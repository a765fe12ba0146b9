"""The divergence and its gradient are torch's own, with few logits in memory."""

import pytest
import torch
from torch.nn import functional

from benchmarks.harness import measured_peak
from rap_env.models.live.partial_forward import PartialForward
from rap_env.repair.distilling import divergence
from rap_env.scoring.nll import HEAD_TOKENS
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_llm

ROWS = [1, 7, HEAD_TOKENS, HEAD_TOKENS + 37]


def states(llm, rows: int, seed: int) -> torch.Tensor:
    partial = PartialForward(llm)
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, partial.head.in_features, generator=generator).to(llm.dtype)


def by_torch(partial, student, teacher) -> tuple[float, torch.Tensor]:
    student = student.clone().requires_grad_()
    log_q = partial.head_logits(student).float().log_softmax(dim=-1)
    log_p = partial.head_logits(teacher).float().log_softmax(dim=-1).detach()
    value = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    value.backward()
    return value.item(), student.grad


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_divergence_and_gradient_equal_torch(family: str, rows: int) -> None:
    llm = tiny_llm(family)
    partial = PartialForward(llm)
    student, teacher = states(llm, rows, 0), states(llm, rows, 1)
    expected, slope = by_torch(partial, student, teacher)
    value, gradient = divergence(partial, student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    assert value > 0.1
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_supports_the_head_of_every_family(family: str) -> None:
    llm = tiny_llm(family)
    partial = PartialForward(llm)
    student, teacher = states(llm, 20, 0), states(llm, 20, 1)
    expected, slope = by_torch(partial, student, teacher)
    value, gradient = divergence(partial, student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)


def test_the_soft_cap_of_gemma_is_in_both() -> None:
    llm = tiny_llm("gemma2")
    partial = PartialForward(llm)
    # So far out that the cap bends every large logit.
    student, teacher = 30 * states(llm, 50, 0), 30 * states(llm, 50, 1)
    assert llm.adapter.config.final_logit_softcapping == 30
    assert partial.head(student).abs().max() > 60
    expected, slope = by_torch(partial, student, teacher)
    value, gradient = divergence(partial, student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)
    llm.adapter.config.final_logit_softcapping = None
    assert divergence(PartialForward(llm), student, teacher)[0] > 1.5 * value


def test_in_bfloat16_up_to_its_rounding() -> None:
    llm = tiny_llm(dtype=torch.bfloat16)
    partial = PartialForward(llm)
    student, teacher = states(llm, 50, 0), states(llm, 50, 1)
    expected, slope = by_torch(partial, student, teacher)
    value, gradient = divergence(partial, student, teacher)
    assert gradient.dtype == torch.bfloat16
    assert value == pytest.approx(expected, rel=1e-5)  # both from the same rounded logits
    assert (gradient - slope).norm() <= 0.02 * slope.norm()


def test_equal_states_have_no_divergence_and_no_slope() -> None:
    llm = tiny_llm()
    student = states(llm, 40, 0)
    value, gradient = divergence(PartialForward(llm), student, student.clone())
    assert value == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_neither_the_head_nor_the_states_are_touched(wants_gradients: bool) -> None:
    llm = tiny_llm()
    llm.model.requires_grad_(wants_gradients)
    student, teacher = states(llm, 40, 0), states(llm, 40, 1)
    divergence(PartialForward(llm), student, teacher)
    assert all(parameter.grad is None for parameter in llm.model.parameters())
    assert not student.requires_grad
    assert not teacher.requires_grad


def test_logits_of_a_few_tokens_exist_at_a_time() -> None:
    llm = tiny_llm()
    partial, rows = PartialForward(llm), 32 * HEAD_TOKENS
    student, teacher = states(llm, rows, 0), states(llm, rows, 1)
    with measured_peak(llm.device) as measured:
        divergence(partial, student, teacher)
    assert measured.peak_bytes < rows * VOCAB_SIZE * 4  # all logits of one of both
