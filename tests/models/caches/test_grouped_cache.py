"""Caches at a level in live models: one pass, chunks, single tokens and joined rows agree."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rap_env.errors import UnsupportedCacheError
from rap_env.memory import MemoryModel
from rap_env.models.caches.kv_cache import cache_argument, cache_bytes
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.models.grouped import (
    LEVELS,
    POSITIONS,
    assert_near,
    grown,
    last_logits,
    long_llm,
    random_rows,
    rows_of,
    teacher_forced,
    uniform,
)  # fmt: skip
from tests.tiny import FAMILIES, LAYERS, each_family, tiny_model

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
REMOVALS = [Plan(), Plan.removing(0), Plan.removing(2, 1)]


def predicted_bytes(llm, rows: int, tokens: int) -> int:
    memory = MemoryModel(llm)
    return sum(
        memory.cache_bytes(llm.plan.cache_level(n), n, rows, tokens)
        for n in range(LAYERS)
        if n not in llm.removed_attention
    )


@each_family("name", level=LEVELS)
def test_a_batch_equals_one_pass_over_each_row(name, level) -> None:
    llm = long_llm(name)
    rows = random_rows(133, 97, 64)
    native = last_logits(llm, rows)
    llm.apply(uniform(level))
    expected = last_logits(llm, rows)
    assert not torch.equal(expected, native)
    whole = LiveBatch(llm)
    assert_near(whole.prefill(rows), expected, native=native)
    assert whole.kv_bytes == llm.held_bytes.kv_cache == predicted_bytes(llm, 3, 133)
    chunks = LiveBatch(llm, most_tokens=3 * 41)
    assert_near(chunks.prefill(rows), expected, native=native)
    assert chunks.kv_bytes == whole.kv_bytes
    tokens = LiveBatch(llm)
    tokens.prefill([row[:-8] for row in rows])  # each row then fills a group
    assert_near(grown(tokens, [row[-8:] for row in rows]), expected, native=native)
    assert tokens.kv_bytes == whole.kv_bytes


@each_family("name", level=["int8", "int4-window64"])
def test_a_padded_pass_with_a_cache_and_without_one_equals_each_row(name, level) -> None:
    llm = long_llm(name)
    rows = random_rows(100, 70)
    native = teacher_forced(llm, rows)
    llm.apply(uniform(level))
    expected = teacher_forced(llm, rows)
    ids = torch.tensor([rows[0], [0] * 30 + rows[1]])
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for use_cache in (False, True):
        with torch.no_grad():
            output = llm.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache
            )
        for actual, row, alone in zip(output.logits, expected, native, strict=True):
            assert_near(actual[-len(row) :], row, native=alone)


@each_family("name", level=["int4", "window64"], removed=REMOVALS)
def test_masks_and_levels_together(name, level, removed) -> None:
    llm = long_llm(name)
    rows = random_rows(120, 75)
    with llm.applied(removed):
        native = last_logits(llm, rows)
    llm.apply(uniform(level).without(*removed.removed))
    expected = last_logits(llm, rows)
    batch = LiveBatch(llm)
    batch.prefill([row[:-4] for row in rows])
    assert_near(grown(batch, [row[-4:] for row in rows]), expected, native=native)
    places = 2 * 2 * 120 * len(llm.removed_attention)
    if not any(llm.facts.kv_window_tokens):
        assert batch.kv_bytes == predicted_bytes(llm, 2, 120) + places


@each_family("name", level=LEVELS)
def test_rows_join_and_leave(name, level) -> None:
    llm = long_llm(name)
    batch, other = LiveBatch(llm), LiveBatch(llm)
    llm.apply(uniform(level))
    batch.prefill(random_rows(60, 130))
    other.prefill(random_rows(91, 3, seed=3))
    batch.join(other)
    assert (batch.size, batch.length, other.size) == (4, 130, 0)
    assert batch.kv_bytes == predicted_bytes(llm, 4, 130)

    def check(logits: torch.Tensor) -> None:
        expected = last_logits(llm, rows_of(batch))
        with llm.applied(Plan()):
            native = last_logits(llm, rows_of(batch))
        assert_near(logits, expected, native=native)

    check(grown(batch, random_rows(2, 2, 2, 2, seed=5)))
    batch.keep([3, 0, 2])  # the longest leaves
    assert (batch.size, batch.length) == (3, 93)
    assert batch.kv_bytes == predicted_bytes(llm, 3, 93)
    check(grown(batch, random_rows(6, 6, 6, seed=6)))  # two rows fill a group
    assert batch.kv_bytes == predicted_bytes(llm, 3, 99)
    batch.close()
    assert batch.kv_bytes == llm.held_bytes.kv_cache == 0


@EVERY_FAMILY
def test_bytes_are_the_predicted_ones_after_every_token(name) -> None:
    """From before the first group to the first that is out of sight, or past a sliding window."""
    llm = long_llm(name)
    llm.apply(Plan.of({"layer00.cache": "int4-window32", "layer01.cache": "int8"}))
    batch = LiveBatch(llm)
    first = 61 if any(llm.facts.kv_window_tokens) else 21
    batch.prefill(random_rows(first - 1, first - 1))
    for tokens in range(first, first + 47):
        batch.extend([5, 6])
        assert batch.kv_bytes == predicted_bytes(llm, 2, tokens), tokens


@pytest.mark.engine_feature("here", "Live changes", "yes")
@EVERY_FAMILY
def test_levels_change_between_two_steps(name) -> None:
    """Down at once; up not before the batch is new."""
    llm = long_llm(name)
    batch = LiveBatch(llm)
    batch.prefill(random_rows(100, 71))
    native = batch.kv_bytes
    for level in ("int8", "int4", "int4-window64", "int2-window64"):
        llm.apply(uniform(level))
        assert batch.kv_bytes == predicted_bytes(llm, 2, batch.length) < native  # already now
        logits = grown(batch, random_rows(1, 1))
        assert torch.isfinite(logits).all()
    lowest = batch.kv_bytes
    llm.apply(Plan())
    grown(batch, random_rows(1, 1))
    assert batch.kv_bytes == lowest
    rows = rows_of(batch)
    batch.keep([])
    assert_near(batch.prefill(rows), last_logits(llm, rows))


@each_family("name", level=LEVELS)
def test_a_cache_that_was_lowered_is_that_of_its_level(name, level) -> None:
    """In the last layer, whose input no level changes, it is what a prefill at the level stores."""
    llm = long_llm(name, window=POSITIONS)  # all tokens are seen
    batch, fresh = LiveBatch(llm), LiveBatch(llm)
    rows = random_rows(110, 64, 33)
    batch.prefill(rows)
    llm.apply(Plan.of({f"layer{LAYERS - 1:02}.cache": level}))
    fresh.prefill(rows)
    assert batch.kv_bytes == fresh.kv_bytes
    assert_near(batch.extend([3, 4, 5]), fresh.extend([3, 4, 5]))


@pytest.mark.engine_feature("here", "Levels of caches", "a level for each layer")
@each_family("name", level=LEVELS)
def test_rows_of_a_batch_have_levels_of_their_own(name, level) -> None:
    llm = long_llm(name)
    batch, lower = LiveBatch(llm), LiveBatch(llm)
    llm.apply(uniform(level))
    batch.prefill(random_rows(60, 130))
    lower.prefill(random_rows(60, 130))
    llm.apply(Plan())
    other, native = LiveBatch(llm), LiveBatch(llm)
    other.prefill(random_rows(91, 3, seed=3))
    native.prefill(random_rows(91, 3, seed=3))
    batch.join(other)
    assert (batch.size, batch.length) == (4, 130)
    assert batch.plans == [uniform(level)] * 2 + [Plan()] * 2

    def check(count) -> None:
        tokens = random_rows(*[count] * 4, seed=count)
        expected = torch.cat([lower.append(tokens[:2]), native.append(tokens[2:])])
        assert_near(batch.append(tokens), expected)

    for count in (1, 1, 40, 1):
        check(count)
    assert batch.kv_bytes == lower.kv_bytes + native.kv_bytes
    batch.keep([1, 3, 2])
    assert batch.plans == [uniform(level), *[Plan()] * 2]
    lower.keep([1])
    native.keep([1, 0])
    tokens = random_rows(1, 1, 1, seed=8)
    expected = torch.cat([lower.append(tokens[:1]), native.append(tokens[1:])])
    assert_near(batch.append(tokens), expected)
    llm.apply(uniform(level))
    batch.append(random_rows(1, 1, 1, seed=9))
    assert len(batch._parts) == 1  # as soon as all rows have one level
    batch.close()
    lower.close()
    native.close()
    assert llm.held_bytes.kv_cache == 0


def generate(run, rows, **kwargs):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ask = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return run(input_ids=ids, attention_mask=mask, **{**ask, **kwargs})


@each_family("name", level=["int8", "window64"], way=["llm", "model"])
def test_generate_takes_the_likeliest_tokens(name, level, way) -> None:
    """With `llm.generate` and `llm.model.generate`; each row fills a group after a few tokens."""
    llm = long_llm(name)
    llm.apply(uniform(level))
    rows = random_rows(90, 57)
    out = generate(llm.generate if way == "llm" else llm.model.generate, rows)
    for row, new in zip(rows, out[:, 90:].tolist(), strict=True):
        logits = teacher_forced(llm, [row + new[:-1]])[0][len(row) - 1 :]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        best = logits.amax(1)
        assert ((best - chosen) <= 2e-3 * best.abs().max()).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_beam_search(name) -> None:
    """Beams are reordered with their groups: the sequences' own scores are those of one pass."""
    llm = long_llm(name)
    llm.apply(uniform("window64"))
    rows = random_rows(75, 50)
    out = generate(
        llm.generate, rows, num_beams=3, num_return_sequences=2, max_new_tokens=34,
        length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for number, sequence in enumerate(out.sequences[:, 75:].tolist()):
        row = rows[number // 2]
        logits = teacher_forced(llm, [row + sequence[:-1]])[0][len(row) - 1 :]
        likely = logits.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None]).sum()
        torch.testing.assert_close(likely, out.sequences_scores[number], rtol=1e-3, atol=1e-3)


def test_caches_of_other_kinds_are_rejected_and_unchanged() -> None:
    llm = long_llm()
    cache = StaticCache(config=llm.model.config, max_cache_len=64)
    ids = torch.tensor(random_rows(10))
    name = cache_argument(llm.model)
    llm.apply(uniform("int8"))
    with pytest.raises(UnsupportedCacheError, match="StaticCache with StaticLayer cannot be"):
        llm.generate(ids, max_new_tokens=4, **{name: cache})
    assert all(type(layer).__name__ == "StaticLayer" for layer in cache.layers)
    cache = DynamicCache(config=llm.model.config)
    llm.generate(ids, max_new_tokens=4, **{name: cache})
    with pytest.raises(UnsupportedCacheError, match="cannot remove tokens again"):
        cache.crop(-1)
    cache.crop(0)
    held_bytes = cache_bytes(cache)
    mask = torch.ones(1, 15, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(UnsupportedCacheError, match="needs all padding on the left"):
        llm.model(input_ids=ids[:, :2], attention_mask=mask, **{name: cache})
    assert cache_bytes(cache) == held_bytes


def test_another_attention_has_no_levels() -> None:
    model = tiny_model()
    model.config._attn_implementation_internal = "flex_attention"
    llm = ElasticLLM(model, None, name="flex")
    llm.apply(Plan.removing(1))
    with pytest.raises(UnsupportedCacheError, match="and this model runs 'flex_attention'"):
        llm.apply(uniform("int8"))
    assert llm.plan == Plan.removing(1)
