"""`rap serve` beside llama.cpp: files, the best one within a limit, and what tables say."""

import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from experiments.llama_cpp import FileKind, write_with_one_vocabulary
from experiments.studies.equal_process.rows import (
    COLOURS,
    LLAMA,
    RAP,
    FallingRow,
    ProcessRow,
    RejectedRow,
    best_file,
    bytes_of,
    process_figure,
    process_tables,
)
from experiments.studies.equal_process.study import STUDY, plan_of
from experiments.study.console import ExperimentError
from experiments.study.harness import delta_nll_fields
from rap_env.levels import WEIGHT_LEVELS
from rap_env.plan import EMBEDDINGS, Plan, item_names
from tests.models.tiny_gguf import write_tiny_gguf

MIB = 2**20


def process(name, peak_mib, kl_divergence, system=LLAMA, **values):
    return ProcessRow(
        system=system, name=name, peak_bytes=peak_mib * MIB, mapped_bytes=15 * MIB,
        kl_divergence_mean=kl_divergence, kl_divergence_p99=10 * kl_divergence,
        same_top_token_share=0.9, **delta_nll_fields([kl_divergence / 2, kl_divergence]), **values,
    )  # fmt: skip


FILES = [
    process("shipped f16", 1200, 0.002),
    process("Q3_K_M q8_0", 990, 0.07),
    process("once Q4_K_M/q4_K q8_0", 1000, 0.01),
    process("IQ3_XXS q8_0", 800, 0.3),
]
SPEEDS = {RAP: [32.0, 7.0], LLAMA: [41.0, 9.5]}
LIMITS = [process("1.0GiB", 1010, 0.1, RAP, beside="once Q4_K_M/q4_K q8_0", speeds=SPEEDS)]
REJECTED = RejectedRow(limit="0.8GiB", reason="It does not fit.")
FALLING = FallingRow(
    system=RAP, step_s=10, limits=["1.0GiB", "0.8GiB"], served=["1.0GiB", "0.8GiB"],
    memory=[[1.0, 1000 * MIB], [12.0, 830 * MIB], [15.0, 800 * MIB]],
    times_s=[1.0, 2.0, 3.0, 14.0], ready_s=[],
)  # fmt: skip


def test_a_plan_is_read_from_its_summary():
    draw = random.Random(0)
    for _ in range(50):
        levels = {item: draw.choice(WEIGHT_LEVELS[1:-1]) for item in item_names(30)}
        weights = [item for item in levels if not item.endswith("cache") and draw.random() < 0.7]
        plan = Plan.of({item: levels[item] for item in weights} | {"layer03.cache": "int4"})
        assert plan_of(plan.summary) == plan
    assert plan_of("native") == Plan()
    assert plan_of(Plan.of({EMBEDDINGS: "int2"}).summary).levels == {EMBEDDINGS: "int2"}


def test_the_best_file_is_the_one_with_the_least_divergence_that_fits():
    assert best_file(FILES, 1250 * MIB).name == "shipped f16"
    assert best_file([*FILES, *LIMITS], 1024 * MIB).name == "once Q4_K_M/q4_K q8_0"
    assert best_file(FILES, 800 * MIB).name == "IQ3_XXS q8_0"
    with pytest.raises(ExperimentError, match="within"):
        best_file(FILES, 800 * MIB - 1)


def test_a_kind_of_file_is_read_from_its_name():
    assert FileKind.of("once Q3_K_M/q4_K q8_0") == (True, "Q3_K_M", "q4_K", "q8_0")
    assert FileKind.of("shipped f16") == (False, "shipped", "", "f16")
    for wrong in ("Q3_K_M q9", "twice Q3_K_M f16", "a b c f16"):
        with pytest.raises(ExperimentError, match="TYPE"):
            FileKind.of(wrong)


def test_one_copy_of_the_vocabulary_stays_and_all_else_is_copied(tmp_path):
    source, out = tmp_path / "source.gguf", tmp_path / "once.gguf"
    write_tiny_gguf(source, kind="Q4_0", head="Q8_0", ffn=64)
    write_with_one_vocabulary(source, out)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(out)
    old = {tensor.name: tensor for tensor in before.tensors}
    new = {tensor.name: tensor for tensor in after.tensors}
    assert old.keys() - new.keys() == {"output.weight"}
    assert new["token_embd.weight"].tensor_type.name == "Q8_0"
    for name, tensor in new.items():
        source_name = "output.weight" if name == "token_embd.weight" else name
        assert np.array_equal(tensor.data, old[source_name].data)
    entries = {
        name: field.contents()
        for name, field in before.fields.items()
        if not name.startswith("GGUF.")
    }
    assert {name: after.fields[name].contents() for name in entries} == entries


def test_the_table_has_both_servers_at_each_limit():
    (table,) = process_tables([*FILES, *LIMITS, REJECTED, FALLING])
    lines = table.table
    assert [*zip(lines["Limit"], lines["Server"], strict=True)] == [
        ("1.0GiB", RAP),
        ("", f"{LLAMA}: once Q4_K_M/q4_K q8_0"),
        ("0.8GiB", RAP),
        ("", f"{LLAMA}: IQ3_XXS q8_0"),
    ]
    assert [*lines["Answer"]] == ["7.0", "9.5", "-", "-"]
    assert [*lines["Prompt"]] == ["32.0", "41.0", "-", "-"]
    assert [*lines["Peak"]] == ["1,010 MiB", "1,000 MiB", "-", "800 MiB"]


def test_the_figure_names_tokens_and_the_longest_pause():
    tokens, memory = process_figure([FALLING]).axes
    assert tokens.lines[0].get_label() == f"{RAP}: 4 tokens, longest pause 11.0 s"
    assert memory.lines[1].get_ydata() == pytest.approx(np.array([1024, 819.2, 819.2]))


def test_the_published_records_make_the_page():
    rows = STUDY.read(Path("results/equal_process"))
    processes = [row for row in rows if isinstance(row, ProcessRow)]
    of_rap = [row for row in processes if row.system == RAP]
    assert of_rap
    for row in of_rap:
        assert row.beside == best_file(processes, bytes_of(row.name)).name
    assert {row.system for row in rows if isinstance(row, FallingRow)} == set(COLOURS)
