"""A replay of a tiny model from settings to rows, its budget and arrivals, and their sums."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.config import Config
from experiments.config.common import ModelConfig, TextConfig
from experiments.config.study_settings import BudgetConfig, ReplayConfig
from experiments.contexts import load_text
from experiments.studies.replay.serving import ReplayClock, SystemRun, system_policy
from experiments.studies.replay.study import STUDY, OutputJudge, held_out_delta_nll
from experiments.studies.replay.workload import (
    GENERATED_SHARE,
    Budget,
    cotenant_budget,
    make_requests,
    read_arrivals,
)
from experiments.study.console import ExperimentError
from rap_env.errors import RapError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.runtime.memory_meter import TensorMeter
from rap_env.scoring.scorer import PlanScorer
from rap_env.workload.traffic import AZURE_CONV, TraceError
from tests.models.states import saved
from tests.policies import made_policies

LAYERS = 4
REFERENCE = (3, 30)
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SYSTEMS = ["dense", "uniform_native_int4"]


@pytest.fixture(scope="module")
def config(base):
    """Settings for a random model: 24 requests in 6 s, and a budget that falls to 0.36."""
    saved(base / "model", dtype=torch.float32, layers=LAYERS)
    rng = np.random.default_rng(0)
    (base / "story.txt").write_text("".join(rng.choice(list("abcdefghij ,."), 2400)))
    lines = [f"2023-11-16 18:00:{n / 4:09.6f},{8 + 7 * n % 23},{3 + n % 6}" for n in range(24)]
    (base / "trace.csv").write_text(HEAD + "\n".join(lines) + "\n")
    llm = load_llm(str(base / "model"), device="cpu", dtype="float32")
    policy = base / "policy.safetensors"
    made_policies.policy_file(model=MemoryModel(llm)).save(policy)
    settings = ReplayConfig(
        systems=[*SYSTEMS, str(policy)],
        trace=str(base / "trace.csv"),
        every=1,
        time_scale=1.0,
        token_scale=1.0,
        max_prompt_tokens=28,
        text=TextConfig(source=str(base / "story.txt"), windows=6, window_tokens=36),
        reference="3x30",
        max_batch_size=3,
        queue_timeout_s=1.5,
        prefill_chunk_tokens=16,
        mask_loss_windows=1,
    )
    tenants = {"sizes": [0.74], "floor": 0.36, "arrivals_per_minute": 30.0, "mean_stay_s": 1.5}
    return Config(
        stage="replay",
        name="tiny",
        runs_dir=str(base / "runs"),
        progress=False,
        store=None,
        model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
        budget=BudgetConfig(capacity=1.1, seed=1, **tenants),
        replay=settings,
    )


@pytest.fixture(scope="module")
def llm(config):
    return load_llm(config.model.name, device="cpu", dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def _tiny(base):
    """Only tensors are measured, as the process is noisy; blocks go in the tiny policy's order."""
    with pytest.MonkeyPatch.context() as patch:
        order = str(base / "policy.safetensors")
        patch.setattr("experiments.studies.replay.serving.ORDER", order)
        patch.setattr("experiments.studies.replay.serving.process_meter", TensorMeter)
        yield


@pytest.fixture(scope="module")
def folder(config):
    return STUDY.run(config, config.stage_dir("replay"))


@pytest.fixture(scope="module")
def rows(folder):
    return {row.system: row for row in STUDY.read(folder)}


def test_every_system_serves_the_requests_in_its_turn(rows, base):
    assert list(rows) == [*SYSTEMS, "policy.safetensors"]
    for row in rows.values():
        assert sum(row.outcomes.values()) == 24
        assert row.outcomes["served"] == len(row.ttft_s) == len(row.losses)
        assert row.budget_least_bytes == rows["dense"].budget_least_bytes
        assert row.provenance["load"]["trace"] == "trace.csv"
        assert str(base) not in str(row.provenance["load"])


def test_only_the_dense_model_exceeds_the_budget(rows):
    for name in ("uniform_native_int4", "policy.safetensors"):
        assert rows[name].outcomes == {"served": 24}
        assert rows[name].violations == rows[name].violation_byte_s == 0
        assert rows[name].switches > 0
        assert rows[name].removed_mean > 0
    assert rows["uniform_native_int4"].lowered_mean > rows["policy.safetensors"].lowered_mean == 0
    dense = rows["dense"]
    assert dense.violation_byte_s > 0
    assert dense.switches == dense.removed_mean == dense.mask_loss_mean == 0
    assert dense.same_fraction == 1
    assert set(dense.losses) == {0}


def test_the_loss_of_plans_is_the_scorers(config, llm):
    plans = [Plan.removing(1, 4), Plan.uniform(LAYERS, caches="int4")]
    scorer = PlanScorer(llm, load_text(config.replay.text, "report", llm).spread(1))
    expected = [scorer.nll(plan) - scorer.native_nll for plan in plans]
    assert held_out_delta_nll(config, llm, plans) == pytest.approx(expected, abs=1e-5)


def test_what_a_run_counts_is_what_its_intervals_and_handles_add_up_to(config, llm):
    requests, _ = make_requests(config, llm)
    memory = MemoryModel(llm)
    budget = cotenant_budget(config.budget, memory.native_peak_bytes(*REFERENCE))
    run = SystemRun(config.replay, llm, requests, budget)
    stats = run.serve(system_policy("dense", llm))
    assert len(run.handles) == len(requests)
    ends = [0.0, *(interval.end_s for interval in run.intervals)]
    for end_s, interval in zip(ends, run.intervals, strict=False):
        assert end_s - 1e-3 <= interval.time_s <= interval.end_s
        assert interval.budget_bytes in budget.between(interval.time_s - 0.1, interval.end_s)
    assert ends[-1] >= requests[-1].time_s + config.replay.queue_timeout_s
    served = [handle for handle in run.handles if handle is not None and handle.reason == "length"]
    assert stats.tokens >= sum(len(handle.token_ids) for handle in served)
    held = memory.breakdown(Plan(), Request(1, 1, 1)).weights
    assert all(interval.peak_bytes > held for interval in run.intervals)


def test_references_are_the_native_models_greedy_continuations(config, llm):
    judge = OutputJudge(llm)
    for request in make_requests(config, llm)[0][:5]:
        ids, nll = torch.tensor([request.prompt_ids]), []
        for token in judge.reference(request):
            with torch.no_grad():
                logits = llm.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            assert int(logits.argmax()) == token
            nll.append(-float(logits[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert len(nll) == request.new_tokens
        other = [3] * request.new_tokens
        with torch.no_grad():
            logits = llm.model(input_ids=torch.tensor([[*request.prompt_ids, *other]])).logits
        others = -logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1)[:, 3]
        expected = float(others.mean()) - np.mean(nll)
        assert judge.delta_nll(request, other) == pytest.approx(expected, abs=1e-4)
        assert judge.same(request, judge.reference(request)) == request.new_tokens


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trace": "nothing.csv"}, "cannot be read"),
        ({"systems": ["nothing.safetensors"]}, "Unknown policy"),
        ({"systems": ["static_gsi"]}, "Unknown policy"),
        ({"systems": ["uniform_native_int5"]}, "int5"),
        ({"text": TextConfig(source="nothing.txt")}, "Cannot read the text"),
    ],
)
def test_missing_inputs_are_reported_before_the_start(config, tmp_path, changes, sentence):
    changed = replace(config, replay=replace(config.replay, **changes))
    with pytest.raises(RapError, match=sentence):
        STUDY.run(changed, tmp_path / "run")
    assert not (tmp_path / "run" / "replay.jsonl").exists()


def test_prompts_are_cut_from_the_text_to_the_requested_lengths(config, llm):
    requests, load = make_requests(config, llm)
    stream = load_text(config.replay.text, "report", llm).tokens.flatten().tolist() * 2
    for number, request in enumerate(requests):
        prompt = list(request.prompt_ids)
        assert len(prompt) == min(28, 8 + 7 * number % 23)
        assert any(stream[n : n + len(prompt)] == prompt for n in range(len(stream)))
        assert request.new_tokens == 3 + number % 6
    assert make_requests(config, llm) == (requests, load)
    assert make_requests(replace(config, seed=1), llm)[1]["sha256"] != load["sha256"]


# The clock and the budget


def test_the_clock_skips_idle_time_and_never_goes_back():
    now = [100.0]
    clock = ReplayClock(lambda: now[0])
    assert clock() == 0
    clock.start()
    now[0] += 2
    clock.jump_to(10.5)
    clock.jump_to(3)
    now[0] += 0.25
    assert clock() == 10.75


def test_each_level_of_a_budget_holds_from_its_time_on():
    budget = Budget((0, 10, 20), (100, 60, 80))
    assert [budget.at(t) for t in (-5, 0, 9.999, 10, 19, 20, 1000)] == [
        *(100, 100, 100, 60, 60, 80, 80)
    ]
    assert [budget.next_change(t) for t in (0, 10, 20)] == [10, 20, float("inf")]
    assert list(budget.between(0, 9.9)) == [100]
    assert list(budget.between(5, 10)) == [100, 60]
    assert list(budget.between(25, 25)) == [80]


def test_tenants_respect_the_floor_and_their_arrival_rate():
    tenants = {"unit": "bytes", "arrivals_per_minute": 20, "mean_stay_s": 12, "seed": 3}
    settings = BudgetConfig(capacity=1000, floor=400, sizes=[100, 200], **tenants)
    budget = cotenant_budget(settings, 1)
    levels = [budget.at(t) for t in np.arange(0, 20_000, 2.0)]
    assert (min(levels) >= 400, max(levels)) == (True, 1000)
    assert cotenant_budget(settings, 1) == budget
    assert cotenant_budget(replace(settings, seed=4), 1) != budget
    few = cotenant_budget(replace(settings, capacity=10_000, floor=1, sizes=[100]), 1)
    used = [10_000 - few.at(t) for t in np.arange(0, 80_000, 2.0)]
    assert np.mean(used) == pytest.approx(100 * 20 / 60 * 12, rel=0.05)  # Little's law
    assert max(cotenant_budget(BudgetConfig(), 1000).levels_bytes) == 1050
    with pytest.raises(ExperimentError, match="from 1 byte to budget.capacity"):
        cotenant_budget(replace(settings, capacity=300), 1)


# Arrivals


def thinning(**changes):
    settings = {"minutes": 30, "every": 1, "time_scale": 1.0, "token_scale": 1.0}
    lengths = {"max_prompt_tokens": 10**6, "max_new_tokens": 10**6}
    return ReplayConfig(**settings | lengths | changes)


def written(path, *lines):
    (path / "trace.csv").write_text(HEAD + "".join(f"{line}\n" for line in lines))
    return str(path / "trace.csv")


def test_a_trace_counts_from_its_first_request_and_is_thinned_scaled_and_capped(tmp_path):
    trace = written(
        tmp_path,
        "2023-11-16 18:59:58.0000000,100,10",
        "2023-11-16 18:59:58.5000000,200,20",
        "2023-11-16 19:00:02.2500000,4000,0",
        "2023-11-16 19:00:58.0000000,7,7",
        "2023-11-16 19:05:00.0000000,1,1",
    )
    assert read_arrivals(thinning(trace=trace), 0) == [
        *((0.0, 100, 10), (0.5, 200, 20), (4.25, 4000, 1), (60.0, 7, 7), (302.0, 1, 1))
    ]
    assert len(read_arrivals(thinning(trace=trace, minutes=1), 0)) == 3  # without its end
    less = thinning(
        trace=trace, minutes=1, every=2, time_scale=4, token_scale=0.1, max_prompt_tokens=300
    )
    assert read_arrivals(less, 0) == [(0.0, 10, 1), (4.25 / 4, 300, 1)]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], "No request"),
        (["yesterday,1,1"], "'yesterday'"),
        (["2023-11-16 18:59:58,one,1"], "Line 2"),
        (["2023-11-16 18:59:58,0,0"], "Line 2"),
        (None, "path"),  # an empty path is no sampled traffic
    ],
)
def test_a_bad_trace_is_rejected_with_its_line(tmp_path, lines, named):
    trace = "" if lines is None else written(tmp_path, *lines)
    with pytest.raises(TraceError, match=named):
        read_arrivals(thinning(trace=trace), 0)


def test_sampled_arrivals_have_the_rate_and_the_lengths_of_their_traffic():
    settings = thinning(minutes=12)
    times, prompts, new = np.array(read_arrivals(settings, 1)).T
    assert len(times) == pytest.approx(3600, rel=0.05)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential
    assert np.median(prompts + new) == pytest.approx(np.median(AZURE_CONV.quantiles), rel=0.1)
    assert new.sum() / (prompts + new).sum() == pytest.approx(GENERATED_SHARE, rel=0.1)
    assert read_arrivals(settings, 1) == read_arrivals(settings, 1)
    assert read_arrivals(settings, 1) != read_arrivals(settings, 2)
    with pytest.raises(TraceError, match="No request arrives"):
        read_arrivals(thinning(minutes=1e-6), 0)
