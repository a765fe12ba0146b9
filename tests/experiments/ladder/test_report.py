"""Tables and figure of the ladder, from invented records."""

import io

import pytest

from experiments.ladder import llama_cpp_process
from experiments.ladder.level_costs_by_model import LevelCostRow, level_cost_tables
from experiments.ladder.llama_cpp import llama_cpp_tables
from experiments.ladder.llama_cpp_process import measure, target_nll
from experiments.ladder.loss_against_bytes import (
    LadderRow,
    LlamaCppRow,
    LossAgainstBytes,
    ladder_tables,
    loss_against_bytes,
    pareto,
)
from experiments.ladder.outside import OutsideRow, loss_at_equal_bytes, outside_tables
from experiments.study.json_records import request_field
from experiments.study.plotting import style
from experiments.study.table_format import TIMES

MIB = 2**20
PROVENANCE = {"depends_on": {"dtype": "bfloat16"}, "git": None}


def losses(value):
    ends = {"delta_nll_ci_low": value - 0.001, "delta_nll_ci_high": value + 0.001}
    return {"delta_nll": value, **ends, "window_delta_nll": list(ends.values())}


def row(method, name, mib, loss, *, budget=None, fits=True, shape=(1, 128), levels=None):
    return LadderRow(
        method=method, name=name, request=request_field(shape), budget_fraction=budget,
        budget_bytes=None if budget is None else 300 * MIB, held_bytes=int(mib * MIB),
        peak_bytes=int((mib + 20) * MIB), fits=fits, levels=levels or {}, packed=False,
        **losses(loss), provenance=PROVENANCE,
    )  # fmt: skip


def llama(cache, mib, loss, shape=(1, 128)):
    return LlamaCppRow(
        cache=cache, request=request_field(shape), held_bytes=int(mib * MIB),
        resident_bytes=int((mib + 30) * MIB), **losses(loss), provenance=PROVENANCE,
    )  # fmt: skip


def level_cost(model, shipped_format, level, loss, rounding="nearest"):
    return LevelCostRow(
        model=model, shipped_format=shipped_format, what="weights", level=level,
        rounding=rounding, text="wikitext", lowered_bytes=90 * MIB,
        **losses(loss), provenance=PROVENANCE,
    )  # fmt: skip


def outside(method, name, mib, loss, types=None):
    return OutsideRow(
        method=method, name=name, weight_bytes=int(mib * MIB), kl_divergence_mean=loss / 2,
        kl_divergence_p99=loss * 4, same_top_token_share=0.75, levels={},
        tensor_types=types or {}, **losses(loss), provenance=PROVENANCE,
    )  # fmt: skip


OUTSIDE = [
    outside("uniform", "as shipped", 90, 0.0024),
    outside("uniform", "FFN int3", 75, 0.18),
    outside("knapsack", "35 %", 80, 0.07),
    outside("llama.cpp", "Q2_K", 82, 0.13, {"f32": 61, "q4_0": 180, "q3_K": 30}),
    outside("ReplaceMe, cosine", "4 layers", 82, 0.5),
    outside("ReplaceMe, cosine", "8 layers", 74, 1.6),
]

ROWS = [
    row("uniform", "native / native", 270, 0.0),
    row("uniform", "int4 / native", 95, 0.0004, levels={"layer00.ffn": "int4"}),
    row("uniform", "int4 / int4", 93, 0.015, levels={"layer00.cache": "int4"}),
    row("uniform", "int8 / int2", 140, 0.62, levels={"layer00.cache": "int2"}),
    row("removal", "80 %", 215, 0.71, budget=0.8, levels={"layer00.ffn": "removed"}),
    row("removal", "60 %", 180, 3.2, budget=0.6, fits=False, levels={"layer00.ffn": "removed"}),
    row("knapsack", "60 %", 150, 0.002, budget=0.6, levels={"layer00.ffn": "int4"}),
]  # fmt: skip
LLAMA = [llama("f16", 98, 0.004), llama("q4_0", 94, 0.042)]
LEVEL_COSTS = [
    level_cost("smollm2-135m", "Q4_1", "int4", 0.0),
    level_cost("small", "bfloat16", "int4", 0.31),
    level_cost("small", "bfloat16", "int4", 0.12, "fitted"),
]


POLICIES, UNIFORM = (part.table for part in ladder_tables(LossAgainstBytes(ROWS)))


def test_the_table_of_settings_has_losses_and_bytes():
    header, lines = UNIFORM
    assert header[-1].endswith("MiB")
    assert lines[0] == ["bf16 / bf16", "0.0000 [-0.0010, 0.0010]", "270"]
    assert [line[0] for line in lines] == [
        "bf16 / bf16", "int8 / int2", "int4 / bf16", "int4 / int4"
    ]  # fmt: skip


def test_the_table_of_budgets_marks_what_does_not_fit_or_is_missing():
    by_budget = {line[1]: line[3:] for line in POLICIES[1]}
    assert by_budget["80 %"] == ["0.710 [0.709, 0.711]", "-"]
    assert by_budget["60 %"] == ["3.200 [3.199, 3.201] *", "0.0020 [0.0010, 0.0030]"]


def test_the_other_tables_name_formats_and_models():
    (llama_cpp,), (by_model,) = llama_cpp_tables(LLAMA), level_cost_tables(LEVEL_COSTS)
    assert llama_cpp.table[1][1] == ["q4_0", "0.042 [0.041, 0.043]", "94 (124)"]
    header, lines = by_model.table
    assert header[1:] == [
        "smollm2-135m (Q4_1), MiB", "smollm2-135m, ΔNLL", "small (bfloat16), MiB", "small, ΔNLL"
    ]  # fmt: skip
    assert [line[0] for line in lines] == [
        "weights int4, rounded to nearest", "weights int4"
    ]  # fmt: skip
    assert lines[0][1] == "90.0"
    assert lines[1][1:3] == ["-", "-"]


def test_other_methods_stand_by_their_bytes():
    (part,) = outside_tables(OUTSIDE)
    header, lines = part.table
    assert header[:3] == ["Method", "MiB", "ΔNLL"]
    assert [line[0] for line in lines] == [
        "one level: as shipped", "llama.cpp: Q2_K", "ReplaceMe (cosine): 4 layers",
        "knapsack over levels: 35 %", "one level: FFN int3", "ReplaceMe (cosine): 8 layers",
    ]  # fmt: skip
    assert lines[1][1:] == [
        "82.0", "0.130 [0.129, 0.131]", "0.0650", "0.520", "75.0 %", "180 q4_0, 30 q3_K"
    ]  # fmt: skip


def test_the_figure_of_other_methods_names_levels_and_files():
    figure = loss_at_equal_bytes(OUTSIDE)
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.texts} == {"as shipped", "FFN int3", "Q2_K"}
    with style():
        figure.savefig(io.BytesIO(), format="png")


def test_a_dominated_setting_is_not_on_the_pareto_front():
    names = [r.name for r in pareto([r for r in ROWS if r.method == "uniform"])]
    assert names == ["native / native", "int4 / native", "int4 / int4"]


def test_the_figure_has_a_panel_for_each_request_and_names_its_points():
    rows = [*ROWS, row("uniform", "native / native", 650, 0.0, shape=(8, 2048))]
    figure = loss_against_bytes(LossAgainstBytes([*rows, *LLAMA]))
    drawn = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in drawn] == [
        f"1 {TIMES} 128 tokens", f"8 {TIMES} 2,048 tokens"
    ]  # fmt: skip
    labels = {text.get_text() for text in drawn[0].texts}
    assert labels == {
        "bf16 / bf16", "int4 / bf16", "int4 / int4", "f16", "q4_0", "blocks removed",
        "knapsack over levels",
    }  # fmt: skip
    with style():
        figure.savefig(io.BytesIO(), format="png")


def test_the_nll_of_tokens_is_that_of_a_softmax():
    import numpy as np
    import torch

    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32) * 30
    targets = np.array([0, 3, 10, 2, 2], dtype=np.int32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(targets).long(), reduction="none"
    )
    assert target_nll(logits, targets) == pytest.approx(expected.numpy(), abs=1e-9)


def test_a_process_measures_windows_or_memory(monkeypatch):
    class Fake:
        model_bytes, buffers = 10, {"KV": 4}

        def __init__(self, file, cache, rows, tokens, threads):
            self.tokens = tokens

        def nll(self, window):
            return float(window.sum())

        def fill(self, tokens):
            assert tokens == self.tokens

    monkeypatch.setattr(llama_cpp_process, "LlamaCpp", Fake)
    task = {"file": "f", "cache": "f16", "rows": 1, "tokens": 3, "threads": 1}
    assert measure({**task, "windows": [[1, 2, 3]]}) == {
        "model_bytes": 10, "buffers": {"KV": 4}, "nll": [6.0]
    }  # fmt: skip
    sizes = measure(task)
    assert sizes["resident_bytes"] >= sizes["before_bytes"] > 2**20
