"""Quantisers: by the weights, and by a layer's outputs."""

import pytest
import torch
from torch import nn

from rap_env.models.weights import weight_levels
from rap_env.models.weights.gptq import DampedHessian, correction, hessians, quantise_gptq
from rap_env.models.weights.low_bits import stored_level
from rap_env.models.weights.packing import PACKED_LEVELS, PackedLevel, PackedMatrix
from rap_env.models.weights.quantisers import quantise


def _gptq(weight: torch.Tensor, states: torch.Tensor, level: PackedLevel = "int4") -> PackedMatrix:
    return quantise_gptq(weight, level, DampedHessian.of(states.T @ states, 0.01))


def _random(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(64, 64), (24, 16), (7, 40), (64, 96)])
def test_weights_on_a_grid_do_not_change(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, shape, generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # each group uses the whole grid
    groups = -(-shape[1] // 32)
    scale = 2.0 ** torch.randint(-4, 2, (shape[0], groups), generator=generator)
    for steps in (torch.randint(0, 16, (shape[0], groups), generator=generator), 4):
        zero = (8 - steps) * scale
        weight = PackedMatrix.from_codes(codes, scale, zero).widened(torch.float32)
        assert torch.equal(quantise(weight, "int4").widened(torch.float32), weight)
    states = _states(500, 2)[:, : shape[1]]
    assert torch.equal(_gptq(weight, states).widened(torch.float32), weight)


@pytest.mark.parametrize("shape", [(576, 64), (320, 32), (600, 64), (24, 16)])
@pytest.mark.parametrize("native", PACKED_LEVELS)
@pytest.mark.parametrize("level", PACKED_LEVELS[1:])
def test_packed_weights_are_quantised_a_few_rows_at_a_time(shape, native, level, monkeypatch):
    monkeypatch.setattr(weight_levels, "_VALUES_AT_ONCE", 128 * shape[1])
    matrix = quantise(_random(shape), native)
    actual = weight_levels.quantise_by_rows(matrix, level, quantise)
    expected = quantise(matrix.widened(torch.float32), level)
    assert (actual.level, actual.shape) == (stored_level(level, shape), shape)
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(actual.tensors[name], expected.tensors[name]) for name in actual.tensors)


def test_int8_keeps_integers_of_a_row() -> None:
    weight = torch.arange(-127, 128).float().repeat(3, 1) * torch.tensor([[1.0], [0.5], [4.0]])
    assert torch.equal(quantise(weight, "int8").widened(torch.float32), weight)


@pytest.mark.parametrize("shape", [(64, 64), (24, 16), (7, 40)])
def test_the_search_beats_rounding_to_nearest(shape: tuple[int, int]) -> None:
    weight = _random(shape)
    searched = (quantise(weight, "int4").widened(torch.float32) - weight).square().sum()
    nearest = 0.0
    for group in weight.split(32, dim=1):
        low, high = group.amin(dim=1, keepdim=True), group.amax(dim=1, keepdim=True)
        step = (high - low) / 15
        nearest += float((((group - low) / step).round() * step + low - group).square().sum())
    assert searched < 0.85 * nearest


@pytest.mark.parametrize("level", PACKED_LEVELS)
def test_constant_weights_are_kept(level: PackedLevel) -> None:
    for value in (0.0, 0.5, -2.0):
        weight = torch.full((64, 64), value)
        packed = quantise(weight, level)
        assert torch.allclose(packed.widened(torch.float32), weight, rtol=2**-7)


INPUTS, ROWS = 128, 64


def _states(rows: int, seed: int) -> torch.Tensor:
    """Inputs that are correlated and of different sizes, as those of a layer in a model are."""
    mixing = torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    sizes = torch.linspace(0.02, 1, INPUTS).square()
    states = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(seed))
    return states @ (mixing * sizes)


def _weight() -> torch.Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1))


def _output_error(matrix: PackedMatrix, weight: torch.Tensor, states: torch.Tensor) -> float:
    change = matrix.widened(torch.float32) - weight
    return float((states @ change.T).square().sum() / (states @ weight.T).square().sum())


@pytest.mark.parametrize("level", PACKED_LEVELS[1:])
def test_outputs_on_other_inputs_have_far_less_error(level: PackedLevel) -> None:
    weight, calibration, other = _weight(), _states(2000, 2), _states(2000, 3)
    gptq = _output_error(_gptq(weight, calibration, level), weight, other)
    assert gptq < 0.65 * _output_error(quantise(weight, level), weight, other)


def test_fewer_bits_have_more_error_and_compact_scales_hardly_any() -> None:
    weight, calibration, other = _weight(), _states(2000, 2), _states(2000, 3)
    errors = {
        level: _output_error(_gptq(weight, calibration, level), weight, other)
        for level in PACKED_LEVELS[1:]
    }
    assert errors["int4-compact"] < 1.1 * errors["int4"]
    assert 3 * errors["int4"] < errors["int3"] < errors["int2"] / 2


@pytest.mark.parametrize("inputs", [16, 40])
def test_short_groups_and_unused_inputs(inputs: int) -> None:
    weight, states = _weight()[:, :inputs], _states(500, 2)[:, :inputs]
    states[:, 3] = 0
    matrix = _gptq(weight, states)
    assert matrix.shape == (ROWS, inputs)
    assert _output_error(matrix, weight, states) < 0.01


def test_hessians_are_sums_over_all_passes_and_shared_by_layers_with_the_same_input() -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    layers = {"first": first, "second": second, "third": third}
    passes = [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    with hessians(layers) as sums, torch.inference_mode():
        for states in passes:
            third(first(states) + second(states))
    flat = torch.cat([states.view(-1, 4) for states in passes])
    assert torch.allclose(sums["first"], flat.T @ flat, rtol=1e-5, atol=1e-5)
    assert sums["second"] is sums["first"]
    assert not torch.allclose(sums["third"], sums["first"])
    assert torch.equal(sums["first"], sums["first"].T)
    with hessians(layers) as alone, torch.inference_mode():
        for sequence in (sequence for states in passes for sequence in states):
            first(sequence)
    assert torch.allclose(alone["first"], sums["first"], rtol=1e-5, atol=1e-5)
    before = sums["first"].clone()
    first(passes[0])
    assert torch.equal(sums["first"], before)


def test_corrected_weights_make_up_for_changed_inputs() -> None:
    weight, native = _weight(), _states(2000, 2)
    changed = 0.8 * native + 0.09 * native.roll(1, dims=1)
    expected = native @ weight.T
    lost = expected - changed @ weight.T
    corrected_by = correction(
        zip(torch.split(lost, 700), torch.split(changed, 700), strict=True), damping=0.01
    )
    errors = [
        float((changed @ own.T - expected).square().sum())
        for own in (weight + corrected_by, weight)
    ]
    assert errors[0] < 0.1 * errors[1]
    gptq = [
        quantise_gptq(own, "int3", DampedHessian.of(native.T @ native, 0.01))
        for own in (weight + corrected_by, weight)
    ]
    outputs = [changed @ matrix.widened(torch.float32).T for matrix in gptq]
    first, second = (float((output - expected).square().sum()) for output in outputs)
    assert first < 0.7 * second


def test_a_correction_from_fewer_tokens_than_inputs_is_the_same() -> None:
    changed, lost = _random((40, 96)), _random((40, 8))
    hessian = changed.T @ changed
    hessian.diagonal().add_(0.3 * hessian.diagonal().mean())
    expected = torch.linalg.solve(hessian, changed.T @ lost).T
    found = correction([(lost[:25], changed[:25]), (lost[25:], changed[25:])], 0.3)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["int4-compact", "int3", "int2"])
def test_important_inputs_have_less_error(level: PackedLevel) -> None:
    weight, importance = _random((64, 128)), torch.ones(128)
    importance[::4] = 100.0

    def error(matrix: PackedMatrix) -> float:
        return float((matrix.widened(torch.float32) - weight).square().mul(importance).sum())

    assert error(quantise(weight, level, importance)) < 0.8 * error(quantise(weight, level))


def test_each_row_gets_what_is_added_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantise(torch.randn(192, 64), "int8")
    added = torch.randn(192, 64)
    whole = quantise(weight.widened(torch.float32) + added, "int3")
    monkeypatch.setattr(weight_levels, "_VALUES_AT_ONCE", 1)
    in_parts = weight_levels.quantise_by_rows(weight, "int3", quantise, added=added)
    assert all(torch.equal(part, whole.tensors[name]) for name, part in in_parts.tensors.items())
