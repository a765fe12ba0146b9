from __future__ import annotations

import threading

import pytest

from rap_env.plan import Plan
from rap_env.runtime.request_handle import EndEvent, PlanEvent, RequestHandle, TokenEvent
from rap_env.runtime.sampling import SamplingParams


def handle(**settings) -> RequestHandle:
    return RequestHandle((3, 4), SamplingParams(), 1.0, **settings)


def token(number: int) -> TokenEvent:
    return TokenEvent(number, -0.5, 2.0 + number)


def test_a_handle_holds_the_results():
    made = handle()
    assert not made.done
    for number in (7, 8):
        made.emit(token(number))
    made.emit(EndEvent("stop", None, 20.0))
    assert made.result(timeout_s=0) is made
    assert (made.token_ids, made.logprobs) == ([7, 8], [-0.5, -0.5])
    assert (made.first_token_s, made.ended_s, made.reason, made.error) == (9.0, 20.0, "stop", None)


def test_the_plan_is_an_event_only_where_it_changes():
    made, heard = handle(), []
    made.add_listener(heard.append)
    plans = [Plan.removing(*blocks) for blocks in ((), (), (3,), ())]
    for number, plan in enumerate(plans):
        made.note_plan(plan, float(number))
    changes = [PlanEvent(plans[0], 0.0), PlanEvent(plans[2], 2.0), PlanEvent(plans[3], 3.0)]
    assert heard == changes
    assert made.plan == plans[-1]


def test_events_after_the_end_are_ignored():
    made, heard = handle(), []
    made.add_listener(heard.append)
    made.emit(EndEvent("error", "It broke.", 5.0))
    made.emit(token(7))
    made.emit(EndEvent("length", None, 6.0))
    assert heard == [EndEvent("error", "It broke.", 5.0)]
    assert (made.reason, made.token_ids) == ("error", [])


def test_a_late_listener_gets_all_events():
    made, heard = handle(), []
    made.emit(token(7))
    made.add_listener(heard.append)
    made.emit(token(8))
    made.emit(EndEvent("length", None, 9.0))
    after = []
    made.add_listener(after.append)
    assert heard == after
    assert [type(event) for event in heard] == [TokenEvent, TokenEvent, EndEvent]


def test_a_listener_that_raises_is_logged_and_not_called_again(caplog):
    made, heard, calls = handle(), [], []

    def broken(event):
        calls.append(event)
        raise RuntimeError("no")

    made.add_listener(broken)
    made.add_listener(heard.append)
    for number in (1, 2, 3):
        made.emit(token(number))
    assert len(calls) == 1
    assert len(heard) == 3
    assert "not called again" in caplog.text


def test_waiting_ends_with_the_request_or_with_the_timeout():
    made = handle()
    with pytest.raises(TimeoutError, match="has not ended"):
        made.result(timeout_s=0.01)
    threading.Timer(0.05, made.emit, [EndEvent("length", None, 1.0)]).start()
    assert made.result(timeout_s=10).reason == "length"


def test_cancelling_wakes_the_engine_until_it_has_ended():
    calls = []
    made = handle(on_cancel=lambda: calls.append(1))
    made.cancel()
    assert made.cancelled
    made.emit(EndEvent("cancelled", None, 1.0))
    made.cancel()
    assert calls == [1]


def test_ids_are_unique():
    assert len({handle().id for _ in range(5)}) == 5
