from dataclasses import replace

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.workload import SAMPLERS, make_sampler
from rap_env.workload.traffic import AZURE_CODE, AZURE_CONV, LEVELS, TraceError
from tests.made_facts import made_facts

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def memory():
    return MemoryModel(
        made_facts(3, 1000, 4000, base_bytes=3000, kv_bytes_per_token=(8,) * 3, max_positions=2048)
    )


def draws(sampler, count=50, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"trace"}))
def test_every_sampler_works_by_name_and_depends_on_the_generator_alone(memory, name):
    first, second = (draws(make_sampler(name, memory)) for _ in range(2))
    assert first == second
    for request in first:
        memory.check(request.batch_size, request.seq_len_tokens)
        assert request.budget_bytes < memory.native_peak_bytes(
            request.batch_size, request.seq_len_tokens
        )
    if name != "fixed":
        assert draws(make_sampler(name, memory), seed=1) != first


def test_tight_draws_budgets_around_the_lowest_levels(memory):
    facts = replace(memory.facts, kv_heads=(1,) * 3, kv_head_size=(32,) * 3,
                    kv_bytes_per_token=(128,) * 3, weights="packed",
                    level_base_bytes={"int4": 2000})  # fmt: skip
    small = MemoryModel(facts)
    lowered = Plan.uniform(3, caches="int4-window128", embeddings="int4")
    spec = {"name": "tight", "seq_len_range": [64, 1024], "lowered_share_range": [0.8, 1.2]}
    seen = draws(make_sampler(spec, small), 400)
    shares = []
    for request in seen:
        assert 64 <= request.seq_len_tokens <= 1024
        peak_bytes = small.peak_bytes(lowered, request)
        native = small.native_peak_bytes(request.batch_size, request.seq_len_tokens)
        assert request.budget_bytes < native
        if 1.2 * peak_bytes < native:
            shares.append(request.budget_bytes / peak_bytes)
    assert 0.79 < min(shares) < 0.85
    assert 1.1 < max(shares) < 1.21
    assert {request.batch_size for request in seen} == {1, 2, 4, 8, 16}
    with pytest.raises(InvalidRequestError, match="seq_len_range must be a lowest"):
        make_sampler({"name": "tight", "seq_len_range": [64]}, small)
    more = MemoryModel(replace(facts, level_base_bytes={"int4": 2000, "int3": 1000}))
    assert draws(make_sampler({**spec, "levels": "four-bits"}, more), 400) == seen
    assert draws(make_sampler(spec, more), 400) != seen
    with pytest.raises(UnknownNameError, match="ladder 'five-bits'"):
        make_sampler({**spec, "levels": "five-bits"}, small)


def test_grid_draws_every_combination_as_often(memory):
    spec = {
        "name": "grid",
        "batch_sizes": [1, 2],
        "seq_lens_tokens": [10, 20],
        "budget_fractions": [0.6, 0.7],
    }
    sampler = make_sampler(spec, memory)
    seen = draws(sampler, 800)
    counts = {request: seen.count(request) for request in sampler.requests}
    assert len(counts) == 8
    assert sum(counts.values()) == 800
    assert min(counts.values()) > 60


def test_grid_takes_budgets_in_bytes(memory):
    sampler = make_sampler({"name": "grid", "budget_bytes": [9000, 10_000]}, memory)
    assert {request.budget_bytes for request in sampler.requests} == {9000, 10_000}


@pytest.mark.parametrize(
    ("name", "table"), [("azure-conv", AZURE_CONV), ("azure-code", AZURE_CODE)]
)
def test_traffic_follows_the_trace_in_stated_ranges(memory, name, table):
    spec = {"name": name, "max_batch_size": 6, "budget_fraction_range": [0.5, 0.7]}
    seen = draws(make_sampler(spec, memory), 4000)
    lengths = [request.seq_len_tokens for request in seen]
    for level in (0.1, 0.25, 0.5, 0.75):
        expected = min(2048, table.quantiles[LEVELS.index(level)])
        assert np.mean(np.array(lengths) <= expected) == pytest.approx(
            1.0 if expected == 2048 else level, abs=0.03
        )
    assert {request.batch_size for request in seen} == {1, 2, 4}
    shares = [
        request.budget_bytes / memory.native_peak_bytes(request.batch_size, request.seq_len_tokens)
        for request in seen
    ]
    assert 0.499 < min(shares) < 0.51
    assert 0.69 < max(shares) < 0.7


def test_trace_draws_at_random(memory, tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:17:0{n},{100 * n},{n}\n" for n in range(1, 6))
    path.write_text(HEADER + rows)
    sampler = make_sampler({"name": "trace", "path": str(path)}, memory)
    assert {r.seq_len_tokens for r in draws(sampler)} == {101, 202, 303, 404, 505}
    assert draws(sampler) == draws(sampler)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line has nothing"),
        ("a,b\n1,2\n", "needs the columns ContextTokens, GeneratedTokens; .* a, b"),
        (HEADER, "has a header but no request"),
        (HEADER + "t,5,6\nt,x,6\n", "Line 3 of .* not 'x' and '6'"),
        (HEADER + "t,5\n", "Line 2 of .* not '5' and None"),
        (HEADER + "t,0,0\n", "Line 2 of"),
    ],
)
def test_a_bad_trace_is_rejected_with_its_line(memory, tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        make_sampler({"name": "trace", "path": str(path)}, memory)


def test_a_trace_without_a_path_names_its_setting(memory):
    for spec in ("trace", {"name": "trace", "path": ""}):
        with pytest.raises(TraceError, match=r"is empty: give a CSV file .* workload\.path"):
            make_sampler(spec, memory)


def test_a_missing_or_binary_trace_is_rejected(memory, tmp_path):
    with pytest.raises(TraceError, match=r"no\.csv cannot be read"):
        make_sampler({"name": "trace", "path": str(tmp_path / "no.csv")}, memory)
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot be read"):
        make_sampler({"name": "trace", "path": str(path)}, memory)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("azure-com", "Unknown sampler 'azure-com'; known are .*'azure-code'.* Did you mean"),
        ({"batch_size": 1}, "Unknown sampler None"),
        ({"name": "fixed", "batchsize": 1}, "of the sampler 'fixed': 'batchsize'; .*batch_size"),
        ({"name": "fixed", "batch_size": 0}, "batch size must be from 1 to .*, not 0"),
        ({"name": "fixed", "seq_len_tokens": 4096}, "from 1 to 2048 tokens"),
        ({"name": "fixed", "budget_fraction": "0.8"}, "between 0 and 1, not '0.8'"),
        ({"name": "fixed", "budget_fraction": 0.5, "budget_bytes": 5}, "not both"),
        ({"name": "fixed", "budget_bytes": 0}, "budget_bytes must be a whole number"),
        ({"name": "grid", "batch_sizes": 4}, "batch_sizes must be of type Sequence, not 4"),
        ({"name": "grid", "budget_fractions": []}, "at least one entry"),
        ({"name": "grid", "budget_fractions": [0.5], "budget_bytes": [5]}, "not both"),
        ({"name": "azure-conv", "max_batch_size": 0}, "from 1 to .*, not 0"),
        ({"name": "azure-conv", "budget_fraction_range": [0.9, 0.5]}, r"\[0\.9, 0\.5\]"),
    ],
)
def test_invalid_settings_are_rejected_at_construction(memory, spec, message):
    with pytest.raises((InvalidRequestError, UnknownNameError), match=message):
        make_sampler(spec, memory)
