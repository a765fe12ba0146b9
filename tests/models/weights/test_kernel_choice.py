"""The choice between a packed kernel and widening, with given times, not measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rap_env.models.weights import kernel_choice
from rap_env.models.weights.kernel_choice import CANDIDATES, most_rows, remembered_rows

FLOAT = torch.float32


def _kernel(states: torch.Tensor) -> object:
    return states


def _widening(states: torch.Tensor) -> object:
    return states


def _times(monkeypatch: pytest.MonkeyPatch, crossing: float) -> None:
    """The kernel takes a unit of time for each row, widening `crossing` for any number."""

    def seconds(product: object, states: torch.Tensor) -> float:
        return float(len(states)) if product is _kernel else crossing

    monkeypatch.setattr(kernel_choice, "_seconds", seconds)


@pytest.mark.parametrize("rows", CANDIDATES)
def test_every_crossing_is_found(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _times(monkeypatch, rows + 0.5)
    assert most_rows(_kernel, _widening, 4, FLOAT) == rows


def test_a_slow_kernel_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _times(monkeypatch, 0.5)
    assert most_rows(_kernel, _widening, 4, FLOAT) == 0


def test_both_ways_are_run() -> None:
    ran = []
    most_rows(lambda states: ran.append(states.shape), lambda states: None, 4, FLOAT)
    assert (1, 4) in ran


def test_the_result_is_kept_for_later_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rap_env.models.device.cache_dir", lambda: tmp_path)
    _times(monkeypatch, 10)
    assert remembered_rows("int4", _kernel, _widening, 4, FLOAT) == 8
    _times(monkeypatch, 100)
    assert remembered_rows("int4", _kernel, _widening, 4, FLOAT) == 8
    assert remembered_rows("int8", _kernel, _widening, 4, FLOAT) == 96
