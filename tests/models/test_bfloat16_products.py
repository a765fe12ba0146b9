"""Products of bfloat16 matrices through float32, on CPUs without instructions for them."""

import pytest
import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rap_env.models import device
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Sets whether the CPU emulates products of bfloat16 matrices."""

    def emulates(answer):
        monkeypatch.setattr(device, "emulated", lambda: answer)

    emulates(True)
    return emulates


def wide_product(states, weight, bias=None):
    return functional.linear(states.float(), weight.float(), None if bias is None else bias.float())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_only_an_x86_cpu_without_the_instructions_emulates(monkeypatch, capabilities, expected):
    monkeypatch.setattr(device, "cpu_capabilities", lambda: capabilities)
    device.emulated.cache_clear()
    assert device.emulated() is expected
    assert device.uses_float32(CPU, torch.bfloat16) is expected
    assert not device.uses_float32(CPU, torch.float32)
    assert not device.uses_float32(META, torch.bfloat16)
    device.emulated.cache_clear()


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "GPT-2"])
def test_sums_are_those_of_float32_rounded_once(on_a_cpu, transposed):
    layer = (Conv1D(40, 48) if transposed else torch.nn.Linear(48, 40)).bfloat16()
    weight = layer.weight.T if transposed else layer.weight
    states = torch.randn(3, 20, 48).bfloat16()
    with device.in_float32():
        actual = layer(states)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, wide_product(states, weight, layer.bias).bfloat16())
    on_a_cpu(False)
    expected = layer(states)
    with device.in_float32():
        assert torch.equal(layer(states), expected)


def test_large_weights_are_widened_in_pieces(on_a_cpu, monkeypatch):
    monkeypatch.setattr(device, "_WEIGHTS", 16 * 10)
    monkeypatch.setattr(device, "TOKENS_AT_ONCE", 4)
    layer, states = torch.nn.Linear(16, 37).bfloat16(), torch.randn(2, 5, 16).bfloat16()
    with device.in_float32():
        actual = layer(states)
    expected = wide_product(states, layer.weight, layer.bias).bfloat16()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_gradients_are_those_of_the_float32_product(on_a_cpu):
    weight = torch.randn(24, 16).bfloat16().requires_grad_()
    states = torch.randn(9, 16).bfloat16().requires_grad_()
    with device.in_float32():
        functional.linear(states, weight).sum().backward()
    ones = torch.ones(9, 24)
    assert torch.equal(weight.grad, (ones.T @ states.detach().float()).bfloat16())
    assert torch.equal(states.grad, (ones @ weight.detach().float()).bfloat16())


def test_scores_of_both_ways_agree_and_are_kept_apart(on_a_cpu):
    llm = ElasticLLM(tiny_model(dtype=torch.bfloat16), None, name="tiny")
    masks = [Plan(), Plan.removing(1), Plan.removing(0, 3)]
    through_float32 = MaskScorer(llm, tokens())
    actual = through_float32.nll_many(masks)
    on_a_cpu(False)
    emulated = MaskScorer(llm, tokens())
    assert actual == pytest.approx(emulated.nll_many(masks), abs=2e-3)
    assert through_float32.context != emulated.context
