from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.harness import measured_peak

CPU = torch.device("cpu")
KIB = 1024


def _floats(kib: int) -> torch.Tensor:
    return torch.ones(kib * KIB // 4)


def test_the_peak_counts_simultaneously_live_tensors_allocated_inside():
    before = _floats(64)
    with measured_peak(CPU) as measured:
        first = _floats(8)
        second = _floats(4)
        del first
        third = _floats(2)
    assert measured.peak_bytes == 12 * KIB
    assert (second.numel(), third.numel()) == (KIB, KIB // 2)
    assert before.numel() == 16 * KIB


def test_temporary_tensors_inside_an_operation_count():
    logits, wanted = torch.randn(64, 100), torch.zeros(64, dtype=torch.long)
    with measured_peak(CPU) as measured:
        functional.cross_entropy(logits, wanted)
    assert measured.peak_bytes >= logits.numel() * 4  # log-probabilities, which are not returned


def test_an_empty_block_has_a_peak_of_zero():
    with measured_peak(CPU) as measured:
        pass
    assert measured.peak_bytes == 0


def test_an_error_in_the_block_propagates_and_the_next_measurement_works():
    with pytest.raises(ZeroDivisionError), measured_peak(CPU):
        1 / 0  # noqa: B018
    with measured_peak(CPU) as measured:
        _floats(8)
    assert measured.peak_bytes == 8 * KIB


@pytest.mark.gpu
def test_the_cuda_allocator_gives_the_same_peak():
    with measured_peak(torch.device("cuda:0")) as measured:
        first = torch.ones(1 << 20, device="cuda:0")
        del first
    assert measured.peak_bytes == 4 << 20
