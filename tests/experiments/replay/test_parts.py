"""Parts of a replay on their own: clock, time series, prompts, and the systems' policies."""

import contextlib
import itertools
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from experiments.config.replay_settings import ReplayConfig
from experiments.replay.budgets import Budget
from experiments.replay.study import sampled_steps
from experiments.replay.system_run import Interval, ReplayClock
from experiments.replay.systems import MeasuredPolicy, OraclePolicy, SystemFactory
from experiments.replay.workload import is_correct, known_answers, make_workload
from experiments.study.experiment_errors import ExperimentError
from rap_env.context.live import LiveContext
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy, make_method
from rap_env.policies.network_policy import NetworkPolicy
from rap_env.request import Request
from rap_env.scoring.corpus import Corpus, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from tests.experiments.replay.replayed import LAYERS, tiny_replay, write_model
from tests.policies import made_ladder
from tests.tiny import tiny_llm


class Time:
    """A stopwatch that the test moves on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeRun:
    """A run whose running requests take ten more seconds."""

    remaining_s = 10.0

    def __init__(self, budget=None, margin=0, llm=None):
        self.measured, self.budget, self.llm = 0, budget, llm
        self.controller = SimpleNamespace(
            monitor=SimpleNamespace(margin=SimpleNamespace(bytes=margin))
        )

    def clock(self):
        return 0.0

    @contextlib.contextmanager
    def measuring(self):
        self.measured += 1
        yield


NATIVE = Plan()


def moment(time_s, seconds, peak, budget, plan=NATIVE):
    return Interval(time_s, seconds, plan, peak, budget)


@pytest.fixture(scope="module")
def loaded(base):
    write_model(base)
    config = tiny_replay(base)
    return config, load_llm(config.model.name, device="cpu", dtype="float32")


def test_the_clock_runs_only_while_there_is_work():
    stopwatch = Time()
    clock = ReplayClock(stopwatch)
    stopwatch.now += 5
    assert clock() == 0
    clock.resume()
    stopwatch.now += 2
    assert clock() == 2
    clock.stop()
    stopwatch.now += 7
    assert clock() == 2
    clock.jump_to(10.5)
    assert clock() == 10.5
    clock.jump_to(3)
    assert clock() == 10.5
    clock.resume()
    stopwatch.now += 0.25
    assert clock() == 10.75


def test_sampled_steps_keep_the_worst_intervals():
    plans = [Plan.removing(3, n % 2) for n in range(2)]
    intervals = [moment(n, 1, 50, 100, plans[n % 2]) for n in range(1000)]
    intervals[555] = moment(555, 1, peak=150, budget=100)
    assert intervals[555].over_bytes == 50
    assert intervals[554].over_bytes == 0
    steps = sampled_steps(intervals, count=100)
    assert len(steps) == 100
    assert max(peak - budget for _, _, peak, budget, _ in steps) == 50
    assert (steps[0][0], steps[-1][1]) == (0, 1000)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(steps))
    assert steps[0][4] in ([0, 3], [1, 3])
    assert sampled_steps([]) == []


def test_prompts_are_cut_from_the_text_to_the_requested_lengths(loaded):
    config, llm = loaded
    workload = make_workload(config, llm)
    assert [asked.number for asked in workload.requests] == list(range(24))
    known = [asked for asked in workload.requests if asked.answer is not None]
    assert len(known) == 6
    text = CorpusConfig(**asdict(config.replay.text), role="report")
    stream = load_corpus(text, llm).tokens.flatten().tolist() * 2
    places = range(len(stream))
    for asked in workload.requests:
        if asked.answer is None:
            prompt = list(asked.prompt_ids)
            assert len(prompt) == min(28, 8 + 7 * asked.number % 23)
            assert any(stream[place : place + len(prompt)] == prompt for place in places)
            assert asked.new_tokens == 3 + asked.number % 6
    assert workload.longest_tokens == max(a.total_tokens for a in workload.requests)
    again = make_workload(config, llm)
    assert again == workload
    other = make_workload(replace(config, seed=1), llm)
    assert other.provenance["sha256"] != workload.provenance["sha256"]


def test_known_answers_follow_their_prompts():
    recall = known_answers(ReplayConfig(), 8, seed=0)
    assert len(recall) == 8
    for context, answer in recall:
        assert f"- {answer}\n" in context  # it is in the list
        assert not context.endswith(answer)
    assert known_answers(ReplayConfig(), 0, seed=0) == []


def test_lambada_asks_for_the_last_word(tmp_path):
    folder = tmp_path / "lambada_openai"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "she went to the sea"}\n{"text": "word"}\n')
    settings = ReplayConfig(data_root=str(tmp_path))
    assert known_answers(settings, 1, seed=0) == [("she went to the", "sea")]
    with pytest.raises(Exception, match="are 1 prompts with a known answer"):
        known_answers(settings, 2, seed=0)


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" sea", True), ("sea, and", True), ("seaside", False), ("the sea", False), ("", False)],
)
def test_an_answer_is_correct_if_it_comes_first_as_a_whole_word(generated, right):
    assert is_correct("sea", generated) is right


def test_the_oracle_chooses_for_the_lowest_future_budget():
    llm = tiny_llm(layers=LAYERS)
    memory = MemoryModel(llm)
    dense = memory.dense_peak_bytes(2, 16)
    budget = Budget((0, 8, 50), (2 * dense, int(0.9 * dense), int(0.5 * dense)))
    inner = OrderPolicy(memory, range(2 * LAYERS))
    request = Request(2, 16, 2 * dense)
    oracle = OraclePolicy(inner, FakeRun(budget))
    assert len(inner.choose(request).removed) == 0
    assert oracle.choose(request) == inner.choose(Request(2, 16, int(0.9 * dense)))
    margin = OraclePolicy(inner, FakeRun(budget, margin=dense // 5))
    assert len(margin.choose(request).removed) > len(oracle.choose(request).removed) > 0
    small = Request(2, 16, dense // 2)  # what there is now counts too
    assert oracle.choose(small) == inner.choose(small)


def test_a_method_that_measures_is_counted_and_removes_all_where_nothing_fits():
    llm = tiny_llm(layers=LAYERS)
    memory, run = MemoryModel(llm), FakeRun(llm=llm)
    context = LiveContext(llm, Corpus.of_tokens(torch.arange(3, 15)[None]), importance="none")
    method = make_method("greedy_per_byte", context)
    policy = MeasuredPolicy(method, run)
    dense = memory.dense_peak_bytes(1, 16)
    assert policy.choose(Request(1, 16, dense)) == Plan()
    assert policy.choose(Request(1, 16, dense - 1)) == method.choose(Request(1, 16, dense - 1))
    assert len(policy.choose(Request(1, 16, 1)).removed) == 2 * LAYERS
    assert run.measured == 3


def test_static_masks_are_the_least_pruned_of_their_order(loaded):
    config, llm = loaded
    workload, memory = make_workload(config, llm), MemoryModel(llm)
    dense = memory.dense_peak_bytes(3, workload.longest_tokens)
    factory = SystemFactory(config, llm, workload, Budget((0,), (int(0.9 * dense),)))
    system = factory.make("static_gsi", FakeRun())
    order = factory._guard_order
    count = len(system.policy.plan.removed)
    assert system.policy.plan == Plan.removing(*order[:count])
    assert system.guard_order == ()
    request = Request(3, workload.longest_tokens, int(0.9 * dense))
    assert memory.peak_bytes(Plan.removing(*order[:count]), request) <= request.budget_bytes
    assert memory.peak_bytes(Plan.removing(*order[: count - 1]), request) > request.budget_bytes
    layers = factory.make("static_shortgpt", FakeRun()).policy.plan.removed
    assert {index ^ 1 for index in layers} == set(layers)  # whole layers


def test_dense_and_static_systems_may_not_be_guarded(loaded):
    config, llm = loaded
    factory = SystemFactory(config, llm, make_workload(config, llm), Budget((0,), (10**9,)))
    for name in ("dense", "static_gsi", "static_shortgpt"):
        assert factory.make(name, FakeRun()).guard_order == ()
    for name in ("rap", "frontier", "oracle", "greedy"):
        assert sorted(factory.make(name, FakeRun()).guard_order) == list(range(2 * LAYERS))


def test_a_policy_over_levels_is_guarded_by_its_own_order(loaded, tmp_path):
    config, llm = loaded
    made_ladder.policy_file(MemoryModel(llm)).save(tmp_path / "levels.safetensors")
    changed = replace(config.replay, policy=str(tmp_path / "levels.safetensors"))
    config, workload = replace(config, replay=changed), make_workload(config, llm)
    factory = SystemFactory(config, llm, workload, Budget((0,), (10**9,)))
    system = factory.make("rap", FakeRun())
    assert isinstance(system.policy, NetworkPolicy)
    assert system.guard_order == system.policy.order
    with pytest.raises(ExperimentError, match="holds no GSI order"):
        factory.make("static_gsi", FakeRun())
