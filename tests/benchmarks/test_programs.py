"""Every benchmark on a tiny model: what it counts, and that it ends in a record."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import conversations, decide, episodes, levels, memory, preparing, scoring, step
from benchmarks.memory import measured_peak
from rap_env.memory import MemoryModel
from rap_env.models.device import resident_bytes
from rap_env.models.files.loading import load_llm
from tests.models.states import saved
from tests.policies import made_ladder
from tests.tiny import tiny_llm

CPU = torch.device("cpu")
KIB = 1024
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tiny"), "llama_tied", torch.float32, layers=LAYERS)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(tmp_path):
    """Runs a benchmark; its records by name."""

    def run(module, schema, **settings):
        common = {"repeats": 1, "threads": 1, "results_dir": str(tmp_path)}
        module.main(schema(**{**common, **settings}))
        return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return run


def test_every_benchmark_has_a_docstring_and_stands_in_the_makefile():
    lines = Path("Makefile").read_text().splitlines()
    listed = next(line for line in lines if line.startswith("BENCHMARKS :=")).split(":=")[1].split()
    names = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    assert all(module.__doc__ for module in modules.values())
    assert {*listed} == {name for name, module in modules.items() if hasattr(module, "main")}


def test_the_decisions_of_a_policy_are_timed(folder, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(decide, "SHAPES", ((1, 8), (2, 16)))
    model = MemoryModel(load_llm(folder, weights="native").facts)
    path = tmp_path / "policy.safetensors"
    made_ladder.policy_file(model, vectors=3).save(path)
    records = measured(
        decide, decide.DecideSettings, model=str(folder), weights="native", policy=str(path),
        rounds=1,
    )  # fmt: skip
    (decision,) = records["decide-cpu"]["targets"]
    assert decision["what"] == "ms of a decision on 8 blocks, p99 of 18 requests"
    assert 0 < records["decide-cpu"]["measured"]["p50_ms"]["median"] <= decision["reached"]


def test_what_plans_of_a_prepared_model_lose_is_measured(folder, measured, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    native = MemoryModel(load_llm(folder, weights="native").facts).native_peak_bytes(1, 16)
    records = measured(
        preparing, preparing.PreparingSettings, model=str(folder), tokens=16, windows=1,
        window_tokens=16, budgets_mib=[native / 2**20, 0.8 * native / 2**20],
    )  # fmt: skip
    record = records[f"preparing_quick_{folder.name}-cpu"]["measured"]
    exact, lowered = record["plans"]
    assert exact["predicted"] == exact["delta_nll"]["code"] == 0
    assert lowered["delta_nll"]["code"] != 0
    assert record["native_peak_bytes"] == native
    assert record["taken"]["seconds"] > 0
    assert record["taken"]["cpu_s"] > 0


def test_steps_of_the_environments_are_timed_beside_cart_pole(measured, monkeypatch):
    monkeypatch.setattr(step, "OTHER_TASKS", step.OTHER_TASKS[1:2])
    record = measured(step, step.StepSettings, turns=1, steps=130, single_steps=20)["step-cpu"]
    single, *vectors = record["targets"]
    assert single["against"] == "CartPole-v1"
    assert [("RAPLadder" in row["what"], row["at_least"]) for row in vectors] == [
        (False, 4.0),
        (True, 4.0),
        (False, 8.0),
        (True, 8.0),
    ]
    assert all(row["reached"] > 0 for row in record["targets"])
    steps_per_s = record["measured"]["steps_per_s"]
    assert next(iter(steps_per_s)) == "RAPPrune/SmolLM2-Table-v1, 64"
    assert steps_per_s["RAPLadder/Gemma3-270M-Table-v1, 1024"] > 0


def test_episodes_across_models_are_counted_for_each_cpu_second(measured, monkeypatch):
    monkeypatch.setattr(episodes, "TASK", "RAPLadder/Tiny-v0")
    records = measured(episodes, episodes.EpisodesSettings, repeats=2, turns=40, num_envs=4)
    (row,) = records["episodes-cpu"]["targets"]
    assert row["what"].startswith("episodes of `RAPLadder/Tiny-v0` in a CPU second, 4 ")
    assert 0 < row["low"] <= row["reached"] <= row["high"]
    assert row["at_least"] == 600


class TestMemory:
    def test_the_benchmark_writes_a_record(self, folder, measured, monkeypatch):
        monkeypatch.setattr(memory, "REQUESTS", ("1x8", "2x12"))
        records = measured(memory, memory.ModelSettings, model=str(folder), dtype="float32")
        weights, cache, peak = records["memory-cpu"]["targets"]
        assert (weights["reached"], cache["reached"]) == (0, 0)
        cells = records["memory-cpu"]["measured"]["cells"].values()
        assert peak["reached"] == max(abs(cell["peak_off_%"]) for cell in cells)
        assert len(cells) == 8


def test_levels_are_compared_and_changed(folder, measured):
    records = measured(
        levels, levels.LevelsSettings, model=str(folder), context_tokens=40, cache_tokens=48,
        steps=2,
    )  # fmt: skip
    bounds = [target["at_most"] for target in records["levels-cpu"]["targets"]]
    assert bounds == [0.85, 1.0, 1.15, 1.3, 3.0]


def test_conversations_read_only_what_is_new(measured, monkeypatch):
    monkeypatch.setattr(conversations, "TURNS", 3)
    monkeypatch.setattr(conversations, "FIRST_TOKENS", 60)
    monkeypatch.setattr(conversations, "SPEED_NEW_TOKENS", 20)
    monkeypatch.setattr(conversations, "SPEED_ANSWER_TOKENS", 4)
    llm = tiny_llm(layers=LAYERS, positions=256)
    monkeypatch.setattr("rap_env.serving.served_model.load_served_model", lambda _: llm)
    servers, schema = [], conversations.ConversationSettings
    monkeypatch.setattr(conversations, "Server", lambda command: server_of(servers, command))
    records = measured(conversations, schema, model="m", users=3, system_tokens=100)
    record = records["conversations-cpu"]
    turns, users, speed, fall, all_of_it, idle, keeping, again = record["targets"]
    assert (turns["at_most"], users["at_most"], speed["at_least"]) == (0.2, 0.15, 1.8)
    assert 0 < fall["reached"] < 5
    assert -1 < all_of_it["reached"] < 100
    assert [server.command[-1] for server in servers] == ["off", "on"]
    used_mib = resident_bytes()[1] / 2**20
    assert idle["reached"] == pytest.approx(used_mib, rel=0.5)  # this process stands for both
    assert abs(keeping["reached"]) < used_mib / 2
    assert (again["low"], again["reached"], again["high"]) == (1, 1, 1)
    assert not any(server.is_open for server in servers)
    answer = conversations.ANSWER_TOKENS
    new = conversations.NEW_TOKENS + answer
    taken = (60 + answer - 1) + (60 + new + answer - 1) + 2 * 100
    taken += 3 * 20 + 4 * sum(40 + turn * new + answer - 1 for turn in range(3))
    assert taken <= record["measured"]["kept_tokens"] <= taken + 4  # or luck
    assert llm.kept_bytes == 0


class FakeServer:
    """It answers with two tokens, of which no pass has run the last one at the next turn."""

    def __init__(self, command):
        self.command, self.chats, self.is_open = command, [], True
        self.proc = Path("/proc/self")

    def wait_until_ready(self):
        pass

    def close(self):
        self.is_open = False

    def chat(self, body):
        assert body["model"] == "m"
        self.chats.append([message["content"] for message in body["messages"]])
        yield {"choices": [{"delta": {"content": None}}]}
        yield {"choices": [{"delta": {"content": f"answer {len(self.chats)}"}}]}
        tokens = 10 * len(self.chats[-1])
        usage = {"prompt_tokens": tokens, "completion_tokens": 2}
        details = {"cached_tokens": tokens - 20 + 1}
        yield {"choices": [], "usage": usage | {"prompt_tokens_details": details}}


def server_of(servers, command):
    servers.append(FakeServer(command))
    return servers[-1]


def test_both_servers_get_the_same_chats_with_their_own_answers(measured, monkeypatch):
    servers = []
    monkeypatch.setattr(conversations, "Server", lambda command: server_of(servers, command))
    monkeypatch.setattr(conversations, "llama_command", lambda program, *_: [program])
    schema = conversations.ConversationSettings
    (record,) = measured(conversations, schema, llama_server="llama-server", model="m").values()
    assert record["benchmark"] == "conversations_llama_cpp"
    assert record["targets"][0]["at_most"] == 0.9
    rap, other = servers
    assert not rap.is_open
    assert not other.is_open
    assert rap.chats == other.chats
    *_, last = rap.chats
    assert len(last) == 2 * conversations.TURNS - 1
    assert last[1] == f"answer {len(rap.chats) - conversations.TURNS + 1}"


@pytest.mark.slow
def test_scoring_checks_scores_and_orders_against_a_plain_model(folder, measured):
    records = measured(
        scoring, scoring.ScoringSettings, model=str(folder), windows=2, window_tokens=24, plans=12,
        removals=3, dtype="float32",
    )  # fmt: skip
    assert records["nll_many-cpu"]["measured"]["largest_nll_difference_to_naive"] < 1e-4
    gsi = records["gsi-cpu"]["measured"]
    assert len(gsi["order"]) == 3
    assert gsi["candidates"]["lazy"] <= gsi["candidates"]["exact"] == 8 + 7 + 6


def floats(kib):
    return torch.ones(kib * KIB // 4)


class TestMeasuredPeak:
    def test_it_counts_tensors_that_are_allocated_inside_and_alive_at_one_time(self):
        before = floats(64)
        with measured_peak(CPU) as peak:
            first = floats(8)
            second = floats(4)
            del first
            third = floats(2)
        assert peak == [12 * KIB]
        assert (second.numel(), third.numel()) == (KIB, KIB // 2)
        assert before.numel() == 16 * KIB

    def test_temporary_tensors_inside_an_operation_count(self):
        logits, targets = torch.randn(64, 100), torch.zeros(64, dtype=torch.long)
        with measured_peak(CPU) as peak:
            torch.nn.functional.cross_entropy(logits, targets)
        assert peak[0] >= logits.numel() * 4  # log-probabilities, not returned

    @pytest.mark.gpu
    def test_the_cuda_allocator_gives_the_same_peak(self):
        with measured_peak(torch.device("cuda:0")) as peak:
            first = torch.ones(1 << 20, device="cuda:0")
            del first
        assert peak == [4 << 20]
