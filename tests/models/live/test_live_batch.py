"""Batches across mask changes, compared with one pass with a gate for each token."""

import pytest
import torch

from rap_env.errors import InvalidRequestError
from rap_env.models.caches.kv_cache import PassInterruptedError
from rap_env.models.live import live_batch
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.models.generation import gated_logits
from tests.models.grouped import long_llm, random_rows, rows_of, uniform
from tests.tiny import FAMILIES, LAYERS, each_family, tiny_llm

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
ATTENTION = Plan.removing(*range(0, 2 * LAYERS, 2))
CACHES = ["native", "int8", "int2", "int8-window32", "window32"]
SWITCHES = {
    "first attention comes back": (Plan.removing(0), Plan()),
    "last attention comes back": (Plan.removing(2), Plan()),
    "all attention comes back": (ATTENTION, Plan()),
    "one for another": (Plan.removing(0, 3), Plan.removing(1, 2)),
    "everything comes back": (Plan.removing(*range(2 * LAYERS)), Plan()),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def grown(batch: LiveBatch, steps: int, seed: int = 1) -> torch.Tensor:
    """Logits after some more tokens."""
    for column in zip(*random_rows(*[steps] * batch.size, seed=seed), strict=True):
        logits = batch.extend(column)
    return logits


def lose_cache(llm, batch: LiveBatch) -> None:
    """Let a step fail, after which the cache has to be computed again."""
    down = llm.adapter.sites(llm.model)[-1].slots[0].original
    handle = down.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        batch.extend([5] * batch.size)
    handle.remove()
    assert batch.kv_bytes == 0


@pytest.mark.engine_feature("here", "Live changes", "yes")
@each_family("name")
def test_a_refilled_state_equals_a_fresh_prefill_bit_for_bit(name) -> None:
    llm = tiny_llm(name)
    prompts = random_rows(6, 6)
    (column,) = zip(*random_rows(1, 1, seed=5), strict=True)
    llm.apply(ATTENTION)
    batch, fresh = LiveBatch(llm), LiveBatch(llm)
    batch.prefill(prompts)
    llm.apply(Plan.removing(1))
    lose_cache(llm, batch)
    logits = batch.extend(column)
    fresh.prefill(prompts)
    assert torch.equal(logits, fresh.extend(column))


@each_family("name", switch=SWITCHES)
def test_a_removal_affects_only_later_tokens(name, switch) -> None:
    before, after = switch
    llm = tiny_llm(name)
    llm.apply(after)  # the switch the other way round: what was there goes
    batch = LiveBatch(llm)
    batch.prefill(random_rows(7, 4, 9))
    grown(batch, 2)
    old = batch.length
    llm.apply(before)
    logits = grown(batch, 2, seed=2)
    stays_out = {i for i in after.removed if i % 2 == 0}  # restored attention
    absent = before.removed | stays_out
    gates = {
        index: [index in after.removed] * old + [index in absent] * (batch.length - old)
        for index in before.removed | after.removed
    }
    with llm.applied(Plan()):
        close(logits, gated_logits(llm, rows_of(batch), gates)[:, -1])


@EVERY_FAMILY
def test_rows_join_and_leave_without_affecting_each_other(name) -> None:
    llm = tiny_llm(name)
    llm.apply(Plan.removing(0, 3))
    batch, other = LiveBatch(llm), LiveBatch(llm)
    batch.prefill(random_rows(3, 8))
    other.prefill(random_rows(12, 2, seed=3))
    batch.join(other)
    assert (batch.size, batch.length, other.size, other.length) == (4, 12, 0, 0)
    removed = {index: [True] * 40 for index in (0, 3)}

    def expected() -> torch.Tensor:
        gates = {index: gate[: batch.length] for index, gate in removed.items()}
        with llm.applied(Plan()):
            return gated_logits(llm, rows_of(batch), gates)[:, -1]

    close(grown(batch, 2), expected())
    batch.keep([3, 0])  # the longest leaves, and the padding that it asked for
    assert (batch.size, batch.length) == (2, 5)
    close(grown(batch, 7, seed=7), expected())


@EVERY_FAMILY
def test_a_chunked_prefill_equals_one_prefill(name) -> None:
    llm = tiny_llm(name)
    prompts = random_rows(11, 3, 7)
    for chunk in (1, 4, 11, 50):
        batch = LiveBatch(llm, most_tokens=chunk * len(prompts))
        close(batch.prefill(prompts), gated_logits(llm, prompts, {})[:, -1])
    batch = LiveBatch(llm)
    batch.prefill([prompt[:3] for prompt in prompts])
    more = random_rows(4, 4, 4, seed=9)
    logits = batch.append(more)
    close(logits, gated_logits(llm, rows_of(batch), {})[:, -1])


def test_a_joining_row_under_another_plan_keeps_what_it_has() -> None:
    llm = tiny_llm()
    batch, newcomer = LiveBatch(llm), LiveBatch(llm)
    batch.prefill(random_rows(6))
    llm.apply(Plan.removing(0))
    newcomer.prefill(random_rows(4, seed=2))
    llm.apply(Plan.removing(2))
    batch.join(newcomer)
    logits = grown(batch, 1)
    with llm.applied(Plan()):
        older = gated_logits(
            llm, rows_of(batch)[:1], {0: [False] * 6 + [True], 2: [False] * 6 + [True]}
        )
        newer = gated_logits(llm, rows_of(batch)[1:], {0: [True] * 5, 2: [False] * 4 + [True]})
    close(logits, torch.cat([older[:, -1], newer[:, -1]]))


def test_a_failed_join_leaves_both_batches(monkeypatch) -> None:
    llm = tiny_llm()
    batch, other = LiveBatch(llm), LiveBatch(llm)
    batch.prefill(random_rows(6))
    other.prefill(random_rows(4))
    real, calls = live_batch.append_rows, []

    def fails_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(live_batch, "append_rows", fails_at_the_second)
    with pytest.raises(MemoryError):
        batch.join(other)
    assert (batch.size, other.size) == (1, 1)
    close(other.extend([7]), gated_logits(llm, rows_of(other), {})[:, -1])
    batch.join(other)
    close(batch.extend([3, 4]), gated_logits(llm, rows_of(batch), {})[:, -1])


def test_a_refill_respects_its_token_limit() -> None:
    llm = tiny_llm()
    batch = LiveBatch(llm, most_tokens=6)
    ran = []
    llm.adapter.decoder(llm.model).register_forward_pre_hook(
        lambda _, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batch.prefill(random_rows(8, 8))
    lose_cache(llm, batch)
    logits = grown(batch, 1)
    assert ran == [6, 6, 4, 2, 6, 6, 4, 2]
    close(logits, gated_logits(llm, rows_of(batch), {})[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_callers_may_change_the_logits_and_differentiate_what_they_compute_from_them(dtype) -> None:
    batch = LiveBatch(tiny_llm(dtype=dtype))
    batch.prefill([[3, 4, 5]])
    logits = batch.extend([6])
    assert logits.dtype == torch.float32
    kept = logits.clone()
    logits[:, 0] = -torch.inf
    scale = torch.ones((), requires_grad=True)
    (kept * scale).sum().backward()
    assert scale.grad == kept.sum()


def test_bad_calls_are_rejected_and_change_nothing() -> None:
    llm = tiny_llm()
    batch = LiveBatch(llm)
    with pytest.raises(InvalidRequestError, match="at least one token each"):
        batch.prefill([[3], []])
    batch.prefill([[3, 4], [5]])
    with pytest.raises(InvalidRequestError, match=r"empty it with keep\(\[\]\)"):
        batch.prefill([[3]])
    with pytest.raises(InvalidRequestError, match="2 rows need 2 lists"):
        batch.extend([3])
    other = LiveBatch(tiny_llm())
    other.prefill([[3]])
    with pytest.raises(InvalidRequestError, match="of the same model"):
        batch.join(other)
    assert rows_of(batch) == [[3, 4], [5]]


class Interrupt:
    """Ends a pass before the layer with a number, counted from 0; None ends none."""

    def __init__(self) -> None:
        self.before_layer = None
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked - 1 == self.before_layer

    def at(self, layer) -> None:
        self.before_layer, self.asked = layer, 0


@each_family("name", level=CACHES, tokens=[40, 1], layer=[0, 1])
def test_a_cache_is_as_before_an_interrupted_pass(name, level, tokens, layer):
    interrupt = Interrupt()
    llm = long_llm(name)
    llm.apply(uniform(level).without(2))  # a removed attention block has placeholders in the cache
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    # 128 and 96 tokens: one more begins a group, which takes the place of an old one in a window.
    prompts, more = random_rows(128, 96), random_rows(tokens, tokens, seed=1)
    batch.prefill(prompts), whole.prefill(prompts)
    for _ in range(2):
        interrupt.at(layer)
        with pytest.raises(PassInterruptedError):
            batch.append(more)
        assert rows_of(batch) == prompts
        assert batch.kv_bytes >= whole.kv_bytes  # nothing has to be computed again
    interrupt.at(None)
    assert torch.equal(batch.append(more), whole.append(more))
    assert torch.equal(batch.extend([3, 4]), whole.extend([3, 4]))


def test_a_plan_that_is_lowered_after_an_interruption_finds_the_earlier_tokens():
    llm, interrupt = tiny_llm("llama"), Interrupt()
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts, more = random_rows(40, 33), random_rows(20, 20, seed=1)
    batch.prefill(prompts), whole.prefill(prompts)
    interrupt.at(1)
    with pytest.raises(PassInterruptedError):
        batch.append(more)
    interrupt.at(None)
    llm.apply(Plan.of({"layer00.cache": "int4", "layer01.cache": "int8"}))
    assert torch.equal(batch.append(more), whole.append(more))


def test_an_interrupted_prefill_leaves_an_empty_batch_and_a_refill_is_not_interrupted():
    llm, interrupt = tiny_llm("llama"), Interrupt()
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts = random_rows(6, 9)
    interrupt.at(1)
    with pytest.raises(PassInterruptedError):
        batch.prefill(prompts)
    assert (batch.size, batch.kv_bytes) == (0, 0)
    interrupt.at(None)
    batch.prefill(prompts), whole.prefill(prompts)
    lose_cache(llm, batch)
    interrupt.at(LAYERS)  # after the refill and one whole pass
    assert torch.equal(batch.extend([3, 4]), whole.extend([3, 4]))
    assert interrupt.asked == LAYERS
