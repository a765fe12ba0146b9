"""Decode steps beside another engine: the cells, and which target each of them has."""

import pytest

from benchmarks.engine_steps import EngineStepsSettings, cells_of, targets_of


def test_cells_are_read_in_order():
    assert list(cells_of(["1x128", "8x16"])) == [("1x128", 1, 128), ("8x16", 8, 16)]


@pytest.mark.parametrize("name", ["128", "1x", "x4", "0x4", "1x-4", "axb", ""])
def test_a_malformed_cell_is_named_with_the_form_that_is_read(name):
    with pytest.raises(ValueError, match=f"'{name}' is no cell; write rows x tokens"):
        EngineStepsSettings(cells=["1x128", name])


@pytest.mark.parametrize(
    ("rows", "tokens", "met"),
    [(1, 128, [True]), (8, 128, [False]), (3, 128, []), (1, 512, [True, False])],
)
def test_targets_follow_rows_and_tokens(rows, tokens, met):
    engines = {
        "own": {"decode_s": [1.2, 1.0], "prefill_s": [0.4, 0.4]},
        "llama.cpp": {"decode_s": [1.0, 1.0], "prefill_s": [1.0, 1.0]},
    }
    targets = list(targets_of(engines, rows, tokens))
    assert [target.met for target in targets] == met
    if targets:
        assert (targets[0].reached, targets[0].high) == (pytest.approx(1.1), 1.2)
