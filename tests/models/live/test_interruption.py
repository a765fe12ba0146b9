"""Passes that end between two layers leave a cache from which they can be repeated."""

import pytest
import torch

from rap_env.levels import CacheLevel
from rap_env.models.live.interruption import PassInterruptedError
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.models.live.test_live_batch import close, random_tokens, rows_of
from tests.tiny import LAYERS, each_family, tiny_llm

LEVELS = {
    "int8": (CacheLevel(bits=8), True),
    "int2": (CacheLevel(bits=2), True),
    "int8 with a window": (CacheLevel(bits=8, window_tokens=32), False),
}


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


@each_family("name", layer=[0, 1])
def test_an_interrupted_pass_can_be_repeated(name, layer):
    llm, interrupt = tiny_llm(name), Interrupt()
    llm.apply(Plan.removing(2))  # a removed attention block has placeholders in the cache
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts, more = random_tokens(7, 4), random_tokens(5, 5, seed=1)
    assert torch.equal(batch.prefill(prompts), whole.prefill(prompts))
    rows = rows_of(batch)
    interrupt.at(layer)
    with pytest.raises(PassInterruptedError):
        batch.append(more)
    assert rows_of(batch) == rows
    interrupt.at(None)
    close(batch.append(more), whole.append(more))
    close(batch.extend([3, 4]), whole.extend([3, 4]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_is_kept_unless_a_window_has_replaced_tokens(level, layer):
    (cache, kept), interrupt = LEVELS[level], Interrupt()
    llm = tiny_llm("llama")
    llm.apply(Plan(caches=tuple((n, cache) for n in range(LAYERS))))
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts, more = random_tokens(70, 37), random_tokens(40, 40, seed=1)
    batch.prefill(prompts), whole.prefill(prompts)
    interrupt.at(layer)
    with pytest.raises(PassInterruptedError):
        batch.append(more)
    assert bool(batch.kv_bytes) == (kept or layer == 0)  # before layer 0 nothing is written
    interrupt.at(None)
    if batch.kv_bytes:
        assert torch.equal(batch.append(more), whole.append(more))
        assert torch.equal(batch.extend([3, 4]), whole.extend([3, 4]))


def test_a_plan_that_is_lowered_after_an_interruption_finds_the_earlier_tokens():
    llm, interrupt = tiny_llm("llama"), Interrupt()
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts, more = random_tokens(40, 33), random_tokens(20, 20, seed=1)
    batch.prefill(prompts), whole.prefill(prompts)
    interrupt.at(1)
    with pytest.raises(PassInterruptedError):
        batch.append(more)
    interrupt.at(None)
    llm.apply(Plan(caches=((0, CacheLevel(bits=4)), (1, CacheLevel(bits=8)))))
    assert torch.equal(batch.append(more), whole.append(more))


def test_an_interrupted_prefill_leaves_an_empty_batch_and_a_refill_is_not_interrupted():
    llm, interrupt = tiny_llm("llama"), Interrupt()
    batch, whole = LiveBatch(llm, interrupt=interrupt), LiveBatch(llm)
    prompts = random_tokens(6, 9)
    interrupt.at(1)
    with pytest.raises(PassInterruptedError):
        batch.prefill(prompts)
    assert (batch.size, batch.kv_bytes) == (0, 0)
    interrupt.at(None)
    llm.apply(Plan.removing(0))
    batch.prefill(prompts), whole.prefill(prompts)
    llm.apply(Plan())
    interrupt.at(LAYERS)  # after the refill and one whole pass
    assert torch.equal(batch.extend([3, 4]), whole.extend([3, 4]))
    assert interrupt.asked == LAYERS
