"""The engine within a budget that moves, and from several threads at once."""

from __future__ import annotations

import random
import threading
import time

import pytest

from rap_env.blocks import BlockMask
from rap_env.runtime.demand import Demand
from rap_env.runtime.engine import Engine
from tests.runtime.stand import PLENTY, Stand, alone, greedy, prompt


def test_measured_bytes_stay_within_a_budget_that_jumps():
    stand = Stand(layers=4, hold_s=0.3)
    engine = stand.engine(prefill_chunk_tokens=4, max_batch_size=4)
    top = stand.need(BlockMask(), Demand(4, 40))
    least = stand.need(stand.everything, Demand(1, 40))
    draw = random.Random(0)
    tickets = []

    def before(turn):
        if turn % 8 == 0:
            stand.budget_bytes = int(draw.uniform(0.8 * least, top))
        if turn < 80 and turn % 4 == 0:
            tickets.append(engine.submit(prompt(draw.randint(1, 20), turn), greedy(20)))
        if turn > 150:
            stand.budget_bytes = PLENTY

    stand.controller.gauge.most_bytes = PLENTY
    for turn in range(400):
        before(turn)
        engine.step()
        stand.time_s += 0.1
    assert all(ticket.reason == "length" for ticket in tickets)
    assert engine.stats().preemptions > 0
    assert stand.controller.switches > 10
    for record in stand.records:
        assert record.peak_bytes <= record.budget_bytes
        assert record.held.total <= record.budget_bytes


def test_the_newest_makes_room_and_goes_on_from_its_tokens():
    stand = Stand(guard_order=())
    engine = stand.engine()
    first = engine.submit(prompt(4), greedy(20))
    second = engine.submit(prompt(5, 1), greedy(20))
    for _ in range(6):
        engine.step()
    assert engine.stats().running == 2
    stand.budget_bytes = stand.need(BlockMask(), Demand(1, 30))
    engine.step()
    assert (engine.stats().running, engine.stats().queued) == (1, 1)
    assert second.preemptions == 1
    kept = list(second.token_ids)
    assert kept
    stand.run(engine)
    assert first.ended_s < second.ended_s
    for ticket, ids in ((first, prompt(4)), (second, prompt(5, 1))):
        assert ticket.token_ids == alone(stand.llm, ids, 20)
    assert second.token_ids[: len(kept)] == kept


def test_who_had_to_leave_is_first_in_line():
    stand = Stand(guard_order=())
    engine = stand.engine()
    tickets = [engine.submit(prompt(4, n), greedy(12)) for n in range(4)]
    for _ in range(3):
        engine.step()
    assert engine.stats().running == 3
    stand.budget_bytes = stand.need(BlockMask(), Demand(2, 20))
    stand.run(engine)
    firsts = [ticket.ended_s for ticket in tickets]
    assert firsts == sorted(firsts)
    assert sum(ticket.preemptions for ticket in tickets) == 1


def test_a_request_waits_while_nothing_fits_it_beside_what_runs():
    stand = Stand(guard_order=())
    stand.budget_bytes = stand.need(BlockMask(), Demand(1, 30))
    engine = stand.engine()
    tickets = [engine.submit(prompt(10, n), greedy(20)) for n in range(2)]
    stand.run(engine)
    assert max(record.rows for record in stand.records) == 1
    assert tickets[1].first_token_s >= tickets[0].ended_s
    assert [ticket.preemptions for ticket in tickets] == [0, 0]


def test_nothing_happens_while_the_budget_is_too_small_for_anything():
    stand = Stand()
    engine = stand.engine()
    ticket = engine.submit(prompt(5), greedy(5))
    stand.budget_bytes = 10
    assert not engine.step()
    assert stand.mask == stand.everything
    assert not ticket.done
    stand.budget_bytes = PLENTY
    stand.run(engine)
    assert ticket.reason == "length"
    assert set(ticket.masks) == {BlockMask()}


def test_what_grew_hopeless_is_refused_though_it_was_taken():
    stand = Stand()
    engine = stand.engine()
    ticket = engine.submit(prompt(5), greedy(20))
    stand.budget_bytes = stand.controller.gauge.most_bytes = 1000
    engine.step()
    assert ticket.reason == "error"
    assert "fit no budget" in ticket.error


def test_tokens_say_under_which_mask_they_were_made():
    stand = Stand(hold_s=0.5)
    engine = stand.engine()
    ticket = engine.submit(prompt(5), greedy(40))

    def before(turn):
        low = stand.need(BlockMask.of(0, 1, 2), Demand(1, 45))
        stand.budget_bytes = low if 10 <= turn < 20 else PLENTY

    stand.run(engine, before=before)
    assert len(ticket.masks) == len(ticket.token_ids) == 40
    sizes = [len(mask) for mask in ticket.masks]
    assert sizes[0] == 0 < max(sizes)
    assert sizes[-1] == 0
    assert [decision.why for decision in stand.controller.recent] == ["budget_fell", "room"]


def test_after_a_mask_has_changed_rows_are_what_the_new_mask_makes_of_them():
    stand = Stand(hold_s=0.0, hysteresis_share=0.0)
    engine = stand.engine()
    ticket = engine.submit(prompt(5), greedy(30))

    def before(turn):
        low = stand.need(BlockMask.of(0, 2), Demand(1, 34))
        stand.budget_bytes = low if 5 <= turn < 12 else PLENTY

    stand.run(engine, before=before)
    back = max(n for n, mask in enumerate(ticket.masks) if mask) + 1
    assert 5 < back < 25
    ids = prompt(5) + ticket.token_ids[:back]
    assert ticket.token_ids[back:] == alone(stand.llm, ids, 30 - back)


def test_an_idle_engine_gives_memory_up_and_takes_it_again():
    stand = Stand(hold_s=1.0)
    engine = stand.engine()
    dense = stand.llm.held_bytes.total
    stand.budget_bytes = dense // 2
    assert not engine.step()
    assert stand.llm.held_bytes.total <= dense // 2
    stand.budget_bytes = PLENTY
    for _ in range(3):
        stand.time_s += 1.0
        engine.step()
    assert stand.mask == BlockMask()


@pytest.fixture
def served():
    """An engine in a thread of its own, on real time."""
    stand = Stand(hold_s=0.0, hysteresis_share=0.0, clock=time.monotonic)
    engine = Engine(stand.llm, stand.controller, max_batch_size=4, prefill_chunk_tokens=64)
    stand.controller.gauge.most_bytes = PLENTY
    engine.start()
    yield stand, engine
    engine.close(timeout_s=30)


def test_threads_that_submit_cancel_and_move_the_budget_corrupt_nothing(served):
    stand, engine = served
    tight = stand.need(BlockMask.of(0, 3, 4), Demand(3, 40))
    tickets, stop = [], threading.Event()

    def move_the_budget():
        draw = random.Random(1)
        while not stop.wait(0.003):
            stand.budget_bytes = draw.choice([PLENTY, tight, 10])

    def ask():
        draw = random.Random(2)
        for number in range(40):
            ids = prompt(draw.randint(1, 20), number)
            tickets.append((ids, engine.submit(ids, greedy(draw.randint(1, 20)))))
            if number % 5 == 0:
                draw.choice(tickets)[1].cancel()
            time.sleep(draw.uniform(0, 0.01))

    threads = [threading.Thread(target=work) for work in (move_the_budget, ask)]
    for thread in threads:
        thread.start()
    threads[1].join()
    time.sleep(0.1)
    stop.set()
    threads[0].join()
    stand.budget_bytes = PLENTY
    constant = 0
    for ids, ticket in tickets:
        assert ticket.result(timeout_s=60).reason in ("length", "cancelled")
        if len(set(ticket.masks)) == 1:
            constant += 1
            expected = alone(stand.llm, ids, len(ticket.token_ids), ticket.masks[0])
            assert ticket.token_ids == expected
    assert constant > 3
    stats = engine.stats()
    assert stats.served + stats.cancelled == 40
    assert stats.failed == 0


def test_closing_while_it_runs_ends_all_and_the_thread(served):
    stand, engine = served
    tickets = [engine.submit(prompt(4, n), greedy(50)) for n in range(10)]
    tickets[0].listen(lambda event: None)
    engine.close(timeout_s=30)
    assert all(ticket.result(timeout_s=1).reason in ("length", "cancelled") for ticket in tickets)
    assert not engine.alive
    assert not any(thread.name == "rap-engine" for thread in threading.enumerate())
    assert stand.llm.held_bytes.kv_cache == 0


def test_an_idle_thread_wakes_up_at_once(served):
    _, engine = served
    assert engine.alive
    time.sleep(0.05)
    assert engine.submit(prompt(3), greedy(3)).result(timeout_s=30).reason == "length"
