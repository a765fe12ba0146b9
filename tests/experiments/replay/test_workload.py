"""Arrivals: read from a trace file or drawn, thinned and scaled."""

import numpy as np
import pytest

from experiments.config.replay_settings import ReplayConfig
from experiments.replay.workload import GENERATED_SHARE, read_arrivals, sample_arrivals
from experiments.study.experiment_errors import ExperimentError
from rap_env.workload.traces import AZURE_CONV, TraceError

DEFAULTS = {
    "minutes": 30, "every": 1, "time_scale": 1.0, "token_scale": 1.0, "max_prompt_tokens": 1024,
    "max_new_tokens": 256,
}  # fmt: skip
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def thinning(**changes):
    return ReplayConfig(**{**DEFAULTS, **changes})


@pytest.fixture
def trace(tmp_path):
    lines = [
        "2023-11-16 18:59:58.0000000,100,10",
        "2023-11-16 18:59:58.5000000,200,20",
        "2023-11-16 19:00:02.2500000,4000,0",
        "2023-11-16 19:00:58.0000000,7,7",
        "2023-11-16 19:05:00.0000000,1,1",
    ]
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + "\n".join(lines) + "\n")
    return path


def test_times_count_from_the_first_request(trace):
    assert read_arrivals(trace, thinning(minutes=10, max_prompt_tokens=9999)) == [
        (0.0, 100, 10), (0.5, 200, 20), (4.25, 4000, 1), (60.0, 7, 7), (302.0, 1, 1)
    ]  # fmt: skip


def test_a_trace_is_cut_thinned_scaled_and_capped(trace):
    less = thinning(minutes=1, every=2, time_scale=4, token_scale=0.1, max_prompt_tokens=300)
    assert read_arrivals(trace, less) == [(0.0, 10, 1), (4.25 / 4, 300, 1)]
    assert len(read_arrivals(trace, thinning(minutes=1))) == 3  # the end is not part of it


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "No request arrives"),
        ("yesterday,1,1\n", "Line 2 .*'yesterday'"),
        ("2023-11-16 18:59:58,one,1\n", "Line 2"),
        ("2023-11-16 18:59:58,-1,5\n", "Line 2"),
        ("2023-11-16 18:59:58,0,0\n", "Line 2"),
        ("2023-11-16 18:59:58,1,1\n2023-11-16 18:59:57,1,1\n", "Line 3 .*sort"),
    ],
)
def test_a_bad_file_is_rejected_with_its_line(tmp_path, lines, sentence):
    (tmp_path / "trace.csv").write_text(HEAD + lines)
    with pytest.raises(TraceError, match=sentence):
        read_arrivals(tmp_path / "trace.csv", thinning())


def test_missing_files_and_columns_are_rejected(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_arrivals(tmp_path / "nothing.csv", thinning())
    with pytest.raises(TraceError, match=r"path of the trace is empty: .* as replay\.trace"):
        read_arrivals("", thinning())
    (tmp_path / "trace.csv").write_text("ContextTokens,GeneratedTokens\n1,1\n")
    with pytest.raises(TraceError, match="needs the columns TIMESTAMP"):
        read_arrivals(tmp_path / "trace.csv", thinning())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"every": 0}, "every"), ({"minutes": 0}, "minutes"), ({"time_scale": -1.0}, "time_scale"),
     ({"token_scale": float("nan")}, "token_scale"), ({"max_new_tokens": 0}, "max_new_tokens")],
)  # fmt: skip
def test_impossible_thinning_is_rejected(settings, name):
    with pytest.raises(ExperimentError, match=name):
        thinning(**settings)


def test_sampled_arrivals_have_the_rate_and_the_lengths_of_their_traffic():
    settings = thinning(
        minutes=60, max_prompt_tokens=10**6, max_new_tokens=10**6, arrivals_per_minute=60
    )
    times, prompts, new = np.array(sample_arrivals(settings, seed=1)).T
    assert len(times) == pytest.approx(3600, rel=0.05)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert np.median(prompts + new) == pytest.approx(float(AZURE_CONV.at(0.5)), rel=0.1)
    assert new.sum() / (prompts + new).sum() == pytest.approx(GENERATED_SHARE, rel=0.1)
    assert sample_arrivals(settings, seed=1) == sample_arrivals(settings, seed=1)
    assert sample_arrivals(settings, seed=1) != sample_arrivals(settings, seed=2)


def test_no_arrivals_are_rejected():
    with pytest.raises(ExperimentError, match="arrivals_per_minute"):
        thinning(arrivals_per_minute=0)
    with pytest.raises(TraceError, match="No request arrives"):
        sample_arrivals(thinning(minutes=0.001, arrivals_per_minute=0.001))
