"""What preempted requests have cached is kept, in a file or in memory, and copied back."""

import pytest

from rap_env.plan import Plan
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.running import KeptCaches
from tests.runtime.harness import PLENTY, Harness, alone, greedy, prompt, steps
from tests.runtime.test_sampling import reading


def squeezed(residency="offload", **settings):
    """Two requests, of which the second one has just been preempted."""
    harness = Harness(guard_order=(), residency=residency, hold_s=0.5)
    engine = harness.engine(prefill_chunk_tokens=16, **settings)
    first = engine.submit(prompt(36), greedy(16))
    second = engine.submit(prompt(38, 1), greedy(16))
    while len(second.token_ids) < 3:
        engine.step()
    harness.budget_bytes = harness.need(Plan(), BatchShape(1, 54))
    engine.step()
    assert (first.preemptions, second.preemptions) == (0, 1)
    return harness, engine, (first, second)


@pytest.mark.parametrize("lowered", [False, True])
def test_a_preempted_request_goes_on_from_a_file_without_computing_again(lowered):
    harness, engine, handles = squeezed()
    kv_bytes = harness.llm.held_bytes.kv_cache
    assert kv_bytes == engine._scheduler.batch.rows.kv_bytes  # nothing of it is in memory
    harness.budget_bytes = PLENTY
    if lowered:  # the plan has changed meanwhile
        harness.llm.apply(Plan.uniform(3, caches="int4"))
    harness.run(engine)
    stats = engine.stats()
    assert (stats.preemptions, stats.repeated_tokens, stats.prompt_tokens) == (1, 0, 36 + 38 + 1)
    if not lowered:
        for number, (length, handle) in enumerate(zip((36, 38), handles, strict=True)):
            assert handle.token_ids == alone(harness.llm, prompt(length, number), 16)
    assert harness.llm.held_bytes.kv_cache == 0


def test_without_a_disk_the_cache_is_kept_at_int4_until_it_has_to_go():
    harness, engine, (_, second) = squeezed("resident")
    kept = harness.llm.held_bytes.kv_cache - engine._scheduler.batch.rows.kv_bytes
    assert kept == 0  # not even that fits
    harness.run(engine)
    assert engine.stats().repeated_tokens > 38
    assert second.token_ids == alone(harness.llm, prompt(38, 1), 16)


def test_where_int4_fits_it_is_copied_back():
    harness = Harness(guard_order=(), residency="resident", hold_s=0.5)
    engine = harness.engine(prefill_chunk_tokens=16, restore="next_request")
    handles = [engine.submit(prompt(40, n), greedy(16)) for n in range(2)]
    while len(handles[1].token_ids) < 3:
        engine.step()
    level = harness.llm.held_bytes.kv_cache // 2
    harness.budget_bytes = harness.need(Plan(), BatchShape(2, 55)) - 1
    engine.step()
    assert handles[1].preemptions == 1
    rows = engine._scheduler.batch.rows
    assert 0 < harness.llm.held_bytes.kv_cache - rows.kv_bytes < level
    harness.run(engine)
    assert engine.stats().repeated_tokens == 0
    assert {plan.cache_level(0).bits for plan in handles[1].plans} == {16, 4}


def test_a_prompt_that_was_read_in_part_is_kept_and_one_whose_probabilities_are_asked_is_not():
    for params, repeated in ((greedy(4), 0), (reading(4), 16)):
        harness = Harness(guard_order=(), hold_s=0.0)
        engine = harness.engine(prefill_chunk_tokens=16)
        handle = engine.submit(prompt(40), params)
        engine.step()
        harness.budget_bytes = 10
        engine.step()
        assert handle.preemptions == 1
        harness.budget_bytes = PLENTY
        harness.run(engine)
        assert engine.stats().repeated_tokens == repeated
        assert handle.token_ids == alone(harness.llm, prompt(40), 4)
        assert handle.prompt_samples is None or len(handle.prompt_samples) == 39


def test_a_full_disk_is_logged_once_and_memory_is_used_instead(monkeypatch, caplog):
    harness, engine, (_, second) = squeezed()
    kept = engine._scheduler._kept
    assert isinstance(kept, KeptCaches)

    def full(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr("rap_env.models.caches.tensor_file.TensorFile.append", full)
    harness.budget_bytes = PLENTY
    harness.time_s += 1
    steps(engine, 3)
    harness.budget_bytes = harness.need(Plan(), BatchShape(1, 54))
    steps(engine, 1)
    assert second.preemptions == 2
    assert "No space left" in caplog.text
    harness.run(engine)
    assert second.token_ids == alone(harness.llm, prompt(38, 1), 16)


def test_what_is_kept_of_a_cancelled_request_is_freed():
    harness, engine, (_, second) = squeezed()
    second.cancel()
    engine.step()
    assert not engine._scheduler._kept._batches
    harness.run(engine)
    assert harness.llm.held_bytes.kv_cache == 0
