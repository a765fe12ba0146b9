"""`generate` while masks change between its steps: each way of restoring, each way of decoding."""

import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from rap_env.errors import UnknownNameError, UnsupportedCacheError
from rap_env.models.caches.kv_cache import cache_argument, check_cache, positions_of
from rap_env.plan import Plan
from tests.models.generation import cached_step, gated_logits
from tests.tiny import FAMILIES, LAYERS, each_family, padded_batch, tiny_llm

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
ATTENTION = Plan.removing(*range(0, 2 * LAYERS, 2))
BACK = {"first": Plan.removing(0), "last": Plan.removing(2, 1), "all": ATTENTION}
EVERY_BACK = pytest.mark.parametrize("gone", BACK.values(), ids=BACK.keys())
NEW = 7


class Switch:
    """Applies masks before given steps; step 0 is the prompt."""

    def __init__(self, llm, **masks: Plan) -> None:
        self.llm, self.step = llm, 0
        self.masks = {int(name.removeprefix("at_")): mask for name, mask in masks.items()}

    def __call__(self) -> None:
        if self.step in self.masks:
            self.llm.apply(self.masks[self.step])
        self.step += 1


def generate(llm, switch=None, **kwargs):
    ask = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return llm.generate(before_step=switch, **{**padded_batch(), **ask, **kwargs})


def real_rows(sequences: torch.Tensor) -> list[list[int]]:
    pads = (padded_batch()["attention_mask"] == 0).sum(1)
    return [row[pad:].tolist() for row, pad in zip(sequences, pads, strict=True)]


def assert_greedy(llm, sequences, removed, start=0) -> None:
    """Every token from the `start`-th new one on is the likeliest under the gates."""
    length = sequences.shape[1] - 1
    gates = {index: gate[:length] for index, gate in removed.items()}
    with llm.masked(Plan()):
        rows = [row[:-1] for row in real_rows(sequences)]
        logits = gated_logits(llm, rows, gates)
    first = padded_batch()["input_ids"].shape[1] + start
    seen = logits[:, first - 1 :].float()
    chosen = seen.gather(2, sequences[:, first:, None]).squeeze(2)
    assert chosen.shape[1] > 0
    torch.testing.assert_close(chosen, seen.amax(2), rtol=1e-4, atol=1e-4)


PROMPT = padded_batch()["input_ids"].shape[1]


@each_family("name", gone=BACK)
def test_refill_gives_the_state_of_the_new_mask_from_the_start(name, gone) -> None:
    llm = tiny_llm(name)
    llm.apply(gone)
    out = generate(llm, Switch(llm, at_3=Plan()))
    assert_greedy(llm, out[:, : PROMPT + 3], {i: [True] * 99 for i in gone.removed})
    assert_greedy(llm, out, {}, start=3)


@each_family("name", gone=BACK)
def test_a_restored_block_is_used_from_the_next_request_on(name, gone) -> None:
    llm = tiny_llm(name)
    llm.apply(gone)
    out = generate(llm, Switch(llm, at_3=Plan()), restore="next_request")
    begin = PROMPT + 2
    ffn = {index: [True] * begin + [False] * 99 for index in gone.removed if index % 2}
    assert_greedy(llm, out, ffn | {i: [True] * 99 for i in gone.removed if i % 2 == 0})
    assert llm.plan.mask == Plan()
    assert_greedy(llm, generate(llm), {})


@pytest.mark.parametrize("restore", ["refill", "next_request"])
def test_a_block_restored_and_removed_between_two_tokens(restore) -> None:
    llm = tiny_llm()
    llm.apply(ATTENTION)

    def flicker() -> None:
        llm.apply(Plan())
        llm.apply(ATTENTION)

    out = generate(llm, flicker, restore=restore)
    assert_greedy(llm, out, {index: [True] * 99 for index in sorted(ATTENTION.removed)})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize(
    ("ask", "cached"),
    [
        ({"num_beams": 3}, {}),
        ({"num_beams": 2, "do_sample": True}, {}),
        ({"do_sample": True, "num_return_sequences": 2}, {}),
        ({}, {"prefill_chunk_size": 4}),
    ],
    ids=["beams", "sampled beams", "samples", "chunks"],
)
@EVERY_BACK
def test_decoding_with_a_cache_equals_decoding_without(name, ask, cached, gone) -> None:
    llm = tiny_llm(name)
    actual = []
    for use_cache, more in ((True, cached), (False, {})):
        llm.apply(gone)
        torch.manual_seed(7)
        restored = 5 if more else 3  # chunks are two more passes for the prompt
        switch = Switch(llm, **{f"at_{restored}": Plan()})
        actual.append(generate(llm, switch, use_cache=use_cache, **ask, **more))
    assert torch.equal(*actual)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_sliding", "gemma2"])
@EVERY_BACK
def test_a_static_cache_is_refilled_too(name, gone) -> None:
    llm = tiny_llm(name)
    llm.apply(gone)
    out = generate(llm, Switch(llm, at_3=Plan()), cache_implementation="static")
    assert_greedy(llm, out, {}, start=3)
    llm.apply(Plan())
    out = generate(llm, Switch(llm, at_3=gone), cache_implementation="static")
    begin = PROMPT + 2
    assert_greedy(llm, out, {i: [False] * begin + [True] * 99 for i in gone.removed})
    given = StaticCache(config=llm.model.config, max_cache_len=32)
    llm.apply(gone)
    out = generate(llm, Switch(llm, at_3=Plan()), **{cache_argument(llm.model): given})
    assert_greedy(llm, out, {}, start=3)


class TestGivenCache:
    """A cache that was filled earlier, possibly under another mask."""

    def filled(self, llm, mask: Plan, cache=None):
        batch = padded_batch()
        cache = DynamicCache(config=llm.model.config) if cache is None else cache
        seen = batch["attention_mask"][:, :5]
        with llm.masked(mask), torch.no_grad():
            llm.model(
                input_ids=batch["input_ids"][:, :5],
                attention_mask=seen,
                position_ids=positions_of(seen),
                use_cache=True,
                **{cache_argument(llm.model): cache},
            )
        return {cache_argument(llm.model): cache}

    @EVERY_FAMILY
    def test_it_is_refilled_if_all_tokens_are_given(self, name) -> None:
        llm = tiny_llm(name)
        assert_greedy(llm, generate(llm, **self.filled(llm, ATTENTION)), {})

    @EVERY_FAMILY
    def test_removed_blocks_are_evicted_from_a_given_cache(self, name) -> None:
        llm = tiny_llm(name)
        given = self.filled(llm, Plan())
        llm.apply(ATTENTION)
        out = generate(llm, **given)
        assert_greedy(llm, out, {i: [False] * 5 + [True] * 99 for i in sorted(ATTENTION.removed)})

    def test_new_tokens_alone_are_not_enough_for_a_refill(self) -> None:
        llm = tiny_llm()
        batch = padded_batch()
        ask = {"input_ids": batch["input_ids"][:, 5:]}
        with pytest.raises(UnsupportedCacheError, match="the tokens of this cache are not known"):
            generate(llm, **ask, **self.filled(llm, ATTENTION))
        out = generate(llm, **ask, **self.filled(llm, ATTENTION), restore="next_request")
        whole = torch.cat([batch["input_ids"][:, :5], out], dim=1)
        assert_greedy(llm, whole, {index: [True] * 99 for index in sorted(ATTENTION.removed)})

        embedded = llm.model.get_input_embeddings()(batch["input_ids"])
        llm.apply(ATTENTION)
        ask = {"attention_mask": batch["attention_mask"], "max_new_tokens": 4}
        with pytest.raises(UnsupportedCacheError, match="made from embeddings"):
            llm.generate(inputs_embeds=embedded, before_step=Switch(llm, at_2=Plan()), **ask)

    def test_unsupported_caches_are_rejected_when_the_mask_changes(self) -> None:
        class OtherLayer(DynamicLayer):
            pass

        llm = tiny_llm()
        cache = DynamicCache(config=llm.model.config)
        cache.layers = [OtherLayer() for _ in cache.layers]
        given = self.filled(llm, Plan(), cache)
        seen = []

        def switch() -> None:
            if seen:
                with pytest.raises(UnsupportedCacheError, match="OtherLayer was in use"):
                    llm.apply(ATTENTION)
            seen.append(1)

        out = generate(llm, switch, **given)  # goes on under the old mask
        assert llm.plan.mask == Plan()
        assert_greedy(llm, out, {})
        assert len(seen) == NEW


def test_bad_arguments_are_rejected() -> None:
    llm = tiny_llm()
    with pytest.raises(UnknownNameError, match="restore mode 'refil'"):
        generate(llm, restore="refil")
    with pytest.raises(UnsupportedCacheError, match="prompt_lookup_num_tokens"):
        generate(llm, prompt_lookup_num_tokens=3)
    with pytest.raises(UnsupportedCacheError, match="no layers"):
        check_cache(object())


def test_keys_and_values_are_freed_while_it_generates() -> None:
    llm = tiny_llm(dtype=torch.bfloat16)
    held = []

    def look() -> None:
        if len(held) == 2:
            before = llm.held_bytes.kv_cache
            llm.apply(ATTENTION)
            held.append(before - llm.held_bytes.kv_cache)
        else:
            held.append(llm.held_bytes.kv_cache)

    out = generate(llm, look)
    tokens = 3 * (PROMPT + 1)
    assert held[:2] == [0, 3 * PROMPT * sum(llm.facts.kv_bytes_per_token)]
    assert held[2] == tokens * (sum(llm.facts.kv_bytes_per_token) - 2 * LAYERS)
    del out
    assert llm.held_bytes.kv_cache == 0


def test_generate_does_not_change_the_model_for_other_callers() -> None:
    llm = tiny_llm()
    names = set(vars(llm.model))
    generate(llm, Switch(llm, at_2=Plan.removing(0)))
    assert set(vars(llm.model)) == names


class TestThreads:
    """Several threads generate, score and switch concurrently."""

    def test_under_one_mask_concurrent_calls_equal_single_calls(self) -> None:
        llm = tiny_llm("gemma2")
        llm.apply(Plan.removing(0, 3))
        alone = generate(llm)
        actual: list[torch.Tensor] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                actual.extend(generate(llm) for _ in range(4))
            except BaseException as error:
                errors.append(error)

        def disturb() -> None:
            for _ in range(40):
                with llm.masked(Plan.removing(1, 2)):
                    cached_step(llm.model, padded_batch()["input_ids"], None)

        threads = [threading.Thread(target=work) for _ in range(3)]
        threads.append(threading.Thread(target=disturb))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert len(actual) == 12
        assert all(torch.equal(out, alone) for out in actual)

    def test_switches_take_effect_between_steps(self) -> None:
        """Whenever the mask changes, no step runs under a mixture of two masks."""
        llm = tiny_llm()
        pair = Plan.removing(1, 3)  # both or none
        ran: list[frozenset[int]] = []
        inside: set[int] = set()
        for site in llm.adapter.sites(llm.model):
            site.slots[0].original.register_forward_hook(
                lambda *_, index=site.index: inside.add(index)
            )
        done = threading.Event()

        def switch() -> None:
            masks = [pair, Plan(), ATTENTION]
            for n in range(10**6):
                if done.is_set():
                    return
                llm.apply(masks[n % 3])

        thread = threading.Thread(target=switch)
        thread.start()
        try:
            forward = llm.model.forward

            def record(*args, **kwargs):
                inside.clear()
                out = forward(*args, **kwargs)
                ran.append(frozenset(inside))
                return out

            llm.model.forward = record
            for _ in range(12):
                generate(llm, restore="next_request")
        finally:
            done.set()
            thread.join(60)
        assert len(ran) == 12 * NEW
        assert all(len(step & {1, 3}) in (0, 2) for step in ran)
