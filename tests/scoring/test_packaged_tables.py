"""The score tables in the package: names, fidelity, and environments without torch or model."""

from pathlib import Path

import pytest

from rap_env.plan import every_mask
from rap_env.scoring.score_table import ScoreTable, packaged_names, packaged_tables, table_path

WHOLE = [path for path in packaged_tables() if path.name.startswith("small-")]
PREDICTING = [path for path in packaged_tables() if path not in WHOLE]
MODEL = "smollm2-135m"


def test_a_packaged_table_is_found_by_the_name_of_its_model():
    assert MODEL in packaged_names()
    masks, plans = (table_path(f"score_table:{MODEL}", how) for how in ("bf16", "native"))
    assert masks != plans
    assert {masks, plans} <= set(packaged_tables())
    assert table_path(f"score_table:./{MODEL}") == Path(MODEL)  # a file of this name
    assert sum(path.stat().st_size for path in packaged_tables()) < 2_000_000


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_tables_of_small_models_have_every_mask(path):
    table = ScoreTable.load(path)
    assert set(table.scores) == set(every_mask(table.facts.num_blocks))
    assert table.held_out.fidelity.rows[0].spearman >= 0.99
    assert len(table.held_out.measured) >= 300


@pytest.mark.parametrize("path", PREDICTING, ids=lambda path: path.name)
def test_predictions_agree_with_measurements_that_they_were_not_fitted_to(path):
    table = ScoreTable.load(path)
    everything = table.fidelity.rows[0]
    assert everything.masks >= 100
    assert everything.spearman >= 0.99
    assert everything.median_relative_error <= (0.06 if "low-bits" in path.name else 0.05)
    assert table.fidelity.rows[-1].spearman >= 0.98
    assert (table.levels is None) == (".bf16." in path.name)
