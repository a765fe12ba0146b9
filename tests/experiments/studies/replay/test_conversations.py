"""The workload of conversations, and the study of a tiny model from settings to tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import Config
from experiments.config.common import ModelConfig, TextConfig
from experiments.config.study_settings import ConversationsConfig, ReplayConfig
from experiments.studies.replay.conversations import (
    DRAWN,
    FALLING,
    STUDY,
    TRACE,
    ConversationRow,
    memory_figure,
)
from experiments.studies.replay.workload import draw_conversations, prefix_requests
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.workload.traffic import TraceError
from tests.models.states import saved
from tests.policies.test_knapsack import costs

TEXT = 3 + np.random.default_rng(0).permutation(4000)
SETTINGS = ConversationsConfig(
    conversations=6,
    turns=3,
    system_tokens=40,
    message_tokens=7,
    answer_tokens=6,
    think_s=0.5,
    again_share=0.3,
    held_share=0.3,
    fall_s=0.4,
    return_s=1.2,
)
HEAD = "OffsetMs,ContextTokens,GeneratedTokens,PrefixBlocks\n"
TRACE_ROWS = HEAD + (
    "0,1700,300,0 1 2 3\n"
    "100,900,64,0 4\n"
    "200,600,64,0 7\n"
    "9000,2300,64,0 1 2 8 9\n"
    "9500,40000,64,0 4 5\n"
    "20000,1000,64,0 4\n"
)


# The workload


def every_turn(first):
    return [turn for start in first for turn in (start, *start.later)]


def test_the_same_seed_draws_the_same_conversations():
    first, tokens = draw_conversations(SETTINGS, TEXT, 3)
    assert draw_conversations(SETTINGS, TEXT, 3) == (first, tokens)
    assert draw_conversations(SETTINGS, TEXT, 4)[0] != first
    assert len(first) == 6
    assert [turn.time_s for turn in first] == sorted(turn.time_s for turn in first)
    assert len({turn.prompt_ids[:40] for turn in first}) == 1  # the system prompt
    assert len({turn.prompt_ids[40:] for turn in first}) == 6


def test_what_is_drawn_has_the_means_that_are_set():
    first, _ = draw_conversations(replace(SETTINGS, conversations=1000), TEXT, 0)
    turns = every_turn(first)
    messages = [turn for turn in turns if not turn.again]
    lengths = [len(turn.prompt_ids) - 40 * (turn.turn == 0) for turn in messages]
    assert len(messages) / 1000 == pytest.approx(3, rel=0.1)
    assert np.mean(lengths) == pytest.approx(7, rel=0.1)
    assert np.mean([turn.new_tokens for turn in messages]) == pytest.approx(6, rel=0.1)
    assert np.mean([turn.time_s for turn in turns]) == pytest.approx(0.5, rel=0.1)
    assert len(turns) / len(messages) == pytest.approx(1.3, rel=0.1)


def test_a_turn_has_all_before_it_and_a_branch_replaces_an_answer():
    first, _ = draw_conversations(replace(SETTINGS, again_share=1.0), TEXT, 0)
    start = next(turn for turn in first if len(turn.later) >= 3)
    branch = start.following((5, 6), 10.0)
    assert branch.prompt_ids == start.prompt_ids
    assert branch.time_s == 10.0 + start.later[0].time_s
    assert (start.params.greedy, branch.params.greedy) == (True, False)
    assert (branch.params.seed, branch.new_tokens) == (0, start.new_tokens)
    second = branch.following([7, 8], 20.0)
    assert second.prompt_ids == (*start.prompt_ids, 7, 8, *start.later[1].prompt_ids)
    assert (second.turn, second.again) == (1, False)
    assert second.time_s == 20.0 + start.later[1].time_s
    assert replace(second, later=()).following([], 30.0) is None


def test_the_tokens_of_all_conversations_are_those_that_their_requests_have():
    first, all_tokens = draw_conversations(SETTINGS, TEXT, 0)
    tokens, prefixes = 10_000, set()
    for turn in first:
        longest = turn.all_tokens
        while turn is not None:
            answer = range(tokens, tokens + turn.new_tokens)  # no answer is like another
            whole = (*turn.prompt_ids, *answer)
            assert len(whole) <= longest
            prefixes.update(whole[:n] for n in range(41, len(whole) + 1))
            tokens += turn.new_tokens
            turn = turn.following(answer, 0.0)
    assert all_tokens == 40 + len(prefixes)


@pytest.fixture
def traced(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE_ROWS)
    limits = {"max_prompt_tokens": 100, "max_new_tokens": 5}
    return ReplayConfig(
        trace=str(path), every=1, time_scale=10.0, token_scale=1 / 32, minutes=1.0, **limits
    )


def test_equal_prefixes_of_a_trace_are_equal_tokens(traced):
    requests, tokens = prefix_requests(traced, TEXT, 0)
    assert prefix_requests(traced, TEXT, 0) == (requests, tokens)
    assert prefix_requests(traced, TEXT, 1)[0] != requests
    a, b, c, a2, b2 = requests  # 40,000 tokens are too many
    lengths = [len(request.prompt_ids) for request in requests]
    assert lengths == [53, 28, 19, 72, 31]  # of 1,700, 900, 600, 2,300 and 1,000
    assert a.prompt_ids[:48] == a2.prompt_ids[:48]  # three blocks of 16 tokens
    assert a.prompt_ids[48:53] != a2.prompt_ids[48:53]
    assert b.prompt_ids == b2.prompt_ids[:28]
    assert {request.prompt_ids[:16] for request in requests} == {a.prompt_ids[:16]}
    assert len({request.prompt_ids[16:19] for request in (a, b, c)}) == 3
    assert [request.turn for request in requests] == [0, 0, 0, 1, 1]
    assert [request.time_s for request in requests] == [0, 0.01, 0.02, 0.9, 2.0]
    assert [request.new_tokens for request in requests] == [5, 2, 2, 2, 2]
    assert tokens == 16 * len({0, 1, 2, 3, 4, 7, 8, 9}) + 13


def test_a_trace_is_thinned_by_conversations(traced):
    requests, _ = prefix_requests(replace(traced, every=2), TEXT, 0)
    whole, _ = prefix_requests(traced, TEXT, 0)
    assert requests == [whole[0], whole[2], whole[3]]


@pytest.mark.parametrize(
    ("trace", "named"),
    [
        (f"{HEAD}0,100,3,\n", "Line 2"),
        (f"{HEAD}0,100,3,0 x\n", "'0 x'"),
        (f"{HEAD}0,99999,3,0 1\n", "max_prompt_tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "PrefixBlocks"),
    ],
)
def test_a_malformed_trace_is_reported(traced, trace, named):
    Path(traced.trace).write_text(trace)
    with pytest.raises(TraceError, match=named):
        prefix_requests(traced, TEXT, 0)


# The study


@pytest.fixture(scope="module")
def config(base):
    saved(base / "model", dtype=torch.float32, layers=3, positions=256)
    rng = np.random.default_rng(0)
    (base / "story.txt").write_text("".join(rng.choice(list("abcdefghij ,."), 2400)))
    (base / "trace.csv").write_text(TRACE_ROWS)
    facts = MemoryModel(load_llm(str(base / "model"), device="cpu", dtype="float32")).facts
    made = costs(facts, caches=("int8", "int4"))
    small = {
        item: {level: rise / 1e5 for level, rise in levels.items()}
        for item, levels in made.costs.items()
    }
    replace(made, costs=small).save(base / "costs.json")
    replay = ReplayConfig(
        trace=str(base / "trace.csv"),
        every=1,
        token_scale=1 / 32,
        max_prompt_tokens=100,
        max_batch_size=2,
        prefill_chunk_tokens=16,
        meter="tensors",
        text=TextConfig(source=str(base / "story.txt"), windows=6, window_tokens=36),
    )
    return Config(
        stage="conversations",
        name="tiny",
        runs_dir=str(base / "runs"),
        progress=False,
        store=None,
        model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
        replay=replay,
        conversations=replace(SETTINGS, policy=str(base / "costs.json")),
    )


@pytest.fixture(scope="module")
def folder(config):
    with pytest.MonkeyPatch.context() as patch:
        # As with models of which lowering a block takes less than a pass.
        patch.setattr("rap_env.runtime.memory_estimator._LOWERING_BLOCKS", 0)
        return STUDY.run(config, config.stage_dir("conversations"))


@pytest.fixture(scope="module")
def rows(folder) -> dict[tuple[str, str], ConversationRow]:
    return {(row.workload, row.system): row for row in STUDY.read(folder)}


def test_all_requests_of_all_systems_are_served(rows):
    systems = ("off", "native", "lowered")
    expected = [(workload, system) for workload in (DRAWN, TRACE) for system in systems]
    assert list(rows) == [*expected, (FALLING, "lowered")]
    drawn = rows[DRAWN, "off"].outcomes["served"]
    for (workload, _), row in rows.items():
        assert row.outcomes == {"served": 5 if workload == TRACE else drawn}
        assert (
            row.prompt_tokens == rows[workload if workload == TRACE else DRAWN, "off"].prompt_tokens
        )
        later = row.outcomes["served"] - (3 if workload == TRACE else 6)
        assert len(row.first_token_s) == later


def test_keeping_spares_tokens_and_lowering_spares_more(rows):
    for workload in (DRAWN, TRACE):
        assert rows[workload, "off"].kept_tokens == {}
        assert set(rows[workload, "native"].kept_tokens) == {"native"}
    native, lowered = (rows[DRAWN, name] for name in ("native", "lowered"))
    assert set(lowered.kept_tokens) > {"native"}
    assert sum(lowered.kept_tokens.values()) > sum(native.kept_tokens.values()) > 0


def test_the_predicted_loss_is_that_of_the_plans(rows):
    made_costs_at_most = 0.005  # of all caches in int4 and all weights at their lowest level
    for row in rows.values():
        assert 0 <= row.predicted_delta_nll < made_costs_at_most


def test_a_time_series_shows_that_kept_bytes_follow_the_limit(rows):
    series = rows[FALLING, "lowered"].time_series
    limits = {limit for _, limit, _, _ in series}
    assert len(limits) == 2
    low = [kept for _, limit, _, kept in series if limit == min(limits)]
    high = [kept for _, limit, _, kept in series if limit == max(limits)]
    assert max(low[1:]) < max(high)
    assert all(kept <= used for _, _, used, kept in series)
    figure = memory_figure(list(rows.values()))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["model and running requests", "kept", "free", "limit"]


def test_the_table_has_a_row_for_each_system(rows, folder):
    (table,) = STUDY.tables(list(rows.values()))
    assert [*table.table["Workload"]] == [*["Drawn"] * 3, *["Trace"] * 3, "Falling"]
    kept = table.table["Prompt tokens kept"]
    assert kept[0] == kept[3] == "0.0 %"
    fewer = table.table["of these with fewer bits"]
    assert [*fewer[:2]] == ["-", "0.0 %"]
    assert float(fewer[2].split()[0]) > 0
    assert "Kept as it was read" in (folder / "tables.md").read_text()
