"""Packed matrices: exact bytes, exact widening, and products equal to those of widened weights."""

import multiprocessing
import os
import threading

import pytest
import torch
from torch.nn import functional

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.models import device
from rap_env.models.weights import packing
from rap_env.models.weights.low_bits import matrix_from_tensors, packed_bytes
from rap_env.models.weights.packing import PACKED_LEVELS, PackedLevel, PackedMatrix, buffer_in_use
from rap_env.models.weights.quantisers import quantise
from tests.programs import run_python

SHAPES = [(64, 32), (192, 192), (128, 64), (24, 16), (61, 33), (7, 9), (1, 32), (16, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative error of a sum of products whose operands are rounded once to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _random(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _grid(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and minima that bfloat16 holds exactly, and so do all weights."""
    generator = torch.Generator().manual_seed(1)
    groups = -(-shape[1] // 32)
    codes = torch.randint(0, 16, shape, generator=generator)
    scale = 2.0 ** torch.randint(-4, 2, (shape[0], groups), generator=generator)
    minimum = -scale * torch.randint(0, 16, (shape[0], groups), generator=generator)
    return codes, scale, minimum


def _by_input(scale: torch.Tensor, inputs: int) -> torch.Tensor:
    return scale.repeat_interleave(32, dim=1)[:, :inputs]


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_int4_codes_widen_exactly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale, minimum = _grid(shape)
    matrix = PackedMatrix.from_codes(codes, scale, zero=minimum + 8 * scale)
    expected = codes * _by_input(scale, shape[1]) + _by_input(minimum, shape[1])
    assert torch.equal(matrix.widened(dtype), expected.to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_int8_codes_widen_exactly(shape, dtype) -> None:
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(2))
    scale = _grid(shape)[1][:, 0]
    matrix = PackedMatrix.from_codes(codes, scale)
    assert torch.equal(matrix.widened(dtype), (codes * scale[:, None]).to(dtype))


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_those_of_widened_weights(level, shape, dtype) -> None:
    matrix = quantise(_random(shape), level)
    widened = matrix.widened(torch.float32).double()
    for rows in (1, 3, 8, 40, 100):
        states = _random((rows, shape[1]), seed=3).to(dtype)
        actual = matrix.product(states[None])
        assert actual.dtype == dtype
        assert actual.shape == (1, rows, shape[0])
        _close(actual[0], states.double() @ widened.T, TOLERANCE[dtype])


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_states_of_several_sequences_may_be_a_slice(level, dtype) -> None:
    matrix = quantise(_random((128, 64)), level)
    states = _random((6, 64), seed=1).to(dtype).view(3, 2, 64)[:, -1:]
    assert torch.equal(matrix.product(states), matrix.product(states.clone()))


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_in_pieces_changes_nothing(level, dtype, monkeypatch) -> None:
    matrix = quantise(_random((320, 64)), level)
    states = _random((200, 64), seed=3).to(dtype)
    whole = matrix.product(states)
    monkeypatch.setattr(packing, "PIECE_VALUES", 128 * 64)
    assert packing.piece_rows(matrix.shape) == 128
    assert torch.equal(matrix.product(states), whole)


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("tokens", [5, 300, 512])
def test_a_cpu_that_emulates_bfloat16_multiplies_exact_weights_and_rounds_once(
    level: PackedLevel, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "emulated", lambda: True)
    monkeypatch.setattr(packing, "PIECE_VALUES", 128 * 64)
    matrix = quantise(_random((320, 64)), level)
    states = _random((tokens, 64), seed=3).bfloat16()
    actual = matrix._by_widening(states)
    exact = functional.linear(states.float(), matrix.widened(torch.float32))
    torch.testing.assert_close(actual, exact.bfloat16(), rtol=1e-2, atol=1e-3)
    assert (actual.float() - exact).abs().max() <= exact.abs().max() / 256
    assert torch.equal(matrix._by_widening(states), actual)


def test_bytes_of_known_sizes_and_an_unknown_level() -> None:
    assert packed_bytes("int4", (1536, 576)) == 1536 * 576 // 2 + 1536 * 18 * 4
    assert packed_bytes("int8", (1536, 576)) == 1536 * 576 + 1536 * 2
    assert packed_bytes("int3", (1536, 576)) == (1536 * 576 * 3 + 1536 * 18 * 12) // 8 + 1536 * 2
    assert packed_bytes("int2", (1536, 576)) == (1536 * 576 * 2 + 1536 * 36 * 12) // 8 + 1536 * 2
    assert packed_bytes("int3", (24, 16)) == packed_bytes("int4", (24, 16))
    with pytest.raises(UnknownNameError, match="int1"):
        matrix_from_tensors("int1", (1, 1), {})


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_rebuilt_from_its_tensors(level: PackedLevel, shape: tuple[int, int]) -> None:
    matrix = quantise(_random(shape), level)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in matrix.tensors.values())
    assert packed_bytes(level, shape) == stored
    same = matrix_from_tensors(level, shape, dict(matrix.tensors))
    assert torch.equal(same.widened(torch.float32), matrix.widened(torch.float32))
    with pytest.raises(ArtifactError, match="not"):
        matrix_from_tensors(level, (shape[0] + 64, shape[1]), matrix.tensors)


@pytest.mark.parametrize("level", PACKED_LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_widened_matrix(level, shape, dtype) -> None:
    matrix = quantise(_random(shape), level)
    ids = torch.randint(0, shape[0], (2, 5), generator=torch.Generator().manual_seed(4))
    assert torch.equal(matrix.rows(ids, dtype), matrix.widened(dtype)[ids])


PRODUCTS_OF_HALF_BLOCKS = """
import torch
from rap_env.models.weights import packing
from rap_env.models.weights.quantisers import quantise
from rap_env.models.weights.packing import buffer_in_use, widening_buffer

print(packing.kernel_block_rows())
for shape in ((64, 32), (192, 96)) if packing.kernel_block_rows() else ():
    matrix = quantise(torch.randn(shape), "int4")
    for rows in (1, 5):
        states = torch.randn(rows, shape[1]).bfloat16()
        expected = states.float() @ matrix.widened(torch.float32).T
        actual = matrix._by_kernel(states).float()
        assert (actual - expected).norm() < 0.01 * expected.norm(), (shape, rows)
"""


def test_kernels_that_read_half_blocks_compute_the_same_product() -> None:
    """As on CPUs with AVX2 alone, which torch imitates where the CPU has more."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    ran = run_python("-c", PRODUCTS_OF_HALF_BLOCKS, env=environment)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() == "0":
        pytest.skip("this CPU has no int4 kernel that reads blocks of 32 rows")
    assert ran.stdout.strip() == "32"


def test_products_work_inside_and_after_inference_mode() -> None:
    matrix = quantise(_random((24, 16)), "int8")
    states = _random((3, 16))
    with torch.inference_mode():
        inside = matrix.product(states)
    assert torch.equal(matrix.product(states), inside)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_widens_while_a_thread_of_its_parent_does() -> None:
    matrix = quantise(_random((24, 16)), "int8")
    with buffer_in_use():  # no thread of the child could release it
        forked = multiprocessing.get_context("fork")
        child = forked.Process(target=_product_in_thread, args=(matrix,))
        child.start()
        child.join(60)
    assert child.exitcode == 0


def _product_in_thread(matrix: PackedMatrix) -> None:
    thread = threading.Thread(target=matrix.product, args=(_random((3, 16)),), daemon=True)
    thread.start()
    thread.join(30)
    os._exit(int(thread.is_alive()))


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("auto", 64, torch.bfloat16),  # even if unquantised products are faster in float32
        ("auto", 32, torch.bfloat16),
        ("auto", 0, torch.float32),  # there is no kernel, or one for another layout
        ("float32", 64, torch.float32),
        ("float16", 64, torch.float16),
    ],
)
def test_packed_weights_have_the_dtype_of_their_kernels(monkeypatch, name, block, expected):
    cpu = torch.device("cpu")
    monkeypatch.setattr(packing, "kernel_block_rows", lambda: block)
    monkeypatch.setattr(device, "cpu_capabilities", dict)
    assert packing.choose_packed_dtype(name, cpu) is expected
    assert packing.choose_packed_dtype("auto", torch.device("meta")) is torch.float32
