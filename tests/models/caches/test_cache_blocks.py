"""Blocks of 32 tokens are cut from a row, lowered, written to files, and put together again."""

import itertools

import pytest
import torch

from rap_env.levels import GROUP_TOKENS
from rap_env.models.caches.tensor_file import TensorFile
from rap_env.models.files.loading import load_llm
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.scoring.corpus import TINY_HELD_OUT, CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from tests.models.grouped import LEVELS, long_llm, random_rows, uniform
from tests.tiny import LAYERS


def blocks_of(batch, row=0):
    cached = batch.cached_row(row)
    count = -(-len(cached.tokens) // GROUP_TOKENS)
    return list(cached.tokens), [cached.block(number) for number in range(count)]


def all_at(bits):
    return dict.fromkeys(range(LAYERS), bits)


def filled(llm, tokens, blocks, reserve_tokens=0):
    batch = LiveBatch(llm)
    batch.reserve_tokens = reserve_tokens
    batch.fill(tokens, blocks)
    return batch


def prefilled(llm, *rows):
    batch = LiveBatch(llm)
    batch.prefill(rows)
    return batch


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral_sliding", "qwen3"])
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_row_of_a_batch_goes_on_from_its_blocks(name, level):
    llm, rows = long_llm(name), random_rows(131, 70)
    llm.apply(Plan() if level is None else uniform(level))
    batch = prefilled(llm, *rows)
    for row, tokens in enumerate(rows):
        cached, blocks = blocks_of(batch, row)
        assert cached == tokens
        batch_of_one = filled(llm, cached, blocks, reserve_tokens=150)
        expected = prefilled(llm, tokens)
        for step in range(40):
            found = batch_of_one.extend([3 + step])
            torch.testing.assert_close(found, expected.extend([3 + step]), rtol=1e-4, atol=1e-4)
        assert batch_of_one.plans == expected.plans


@pytest.mark.parametrize("cut", [33, 50, 64])
def test_a_group_in_which_the_cut_falls_is_unpacked_into_the_tail(cut):
    llm, (tokens,) = long_llm(), random_rows(131)
    llm.apply(uniform("int8"))
    _, blocks = blocks_of(prefilled(llm, tokens))
    batch = filled(llm, tokens[:cut], blocks[: -(-cut // GROUP_TOKENS)])
    exact = prefilled(llm, tokens[:cut])
    assert batch.kv_bytes == exact.kv_bytes
    for mine, other in zip(batch._parts[0].cache.layers, exact._parts[0].cache.layers, strict=True):
        for part, same in zip(mine.groups, other.groups, strict=True):
            assert torch.equal(part, same)  # whole groups stay packed
        tail = cut - GROUP_TOKENS * ((cut - 1) // GROUP_TOKENS)
        error = (mine.keys - other.keys)[:, :, :tail].abs().max()
        assert 0 < error < 0.02 * other.keys.abs().max()


def test_lowered_blocks_take_the_bytes_that_are_predicted_and_come_close():
    llm, (tokens,) = long_llm(), random_rows(100)
    _, blocks = blocks_of(prefilled(llm, tokens))
    expected = prefilled(llm, tokens).extend([3])
    errors = []
    for bits in (8, 4):
        lowered = [block.lowered(all_at(bits)) for block in blocks]
        for block, before in zip(lowered, blocks, strict=True):
            assert block.bytes - before.lowered_bytes(all_at(bits)) in range(
                64 * 12
            )  # aligned tensors
            assert block.bytes < before.bytes or len(before.stacks[0].groups[0][0, 0]) < 8
        errors.append((filled(llm, tokens, lowered).extend([3]) - expected).std())
    assert 0 < errors[0] < errors[1] / 4
    again = [block.lowered(all_at(8)).lowered(all_at(4)) for block in blocks]
    assert filled(llm, tokens, again).extend([3]).shape == expected.shape


def test_levels_that_differ_from_block_to_block_become_the_plan_s():
    llm, (tokens,) = long_llm(), random_rows(131)
    _, blocks = blocks_of(prefilled(llm, tokens))
    mixed = [blocks[0].lowered(all_at(4)), blocks[1].lowered({0: 8, 1: 4}), *blocks[2:]]
    batch = filled(llm, tokens, mixed)
    assert batch.plans == [Plan()]
    llm.apply(uniform("int8"))
    batch = filled(llm, tokens, mixed)
    assert batch.plans == [uniform("int8")]
    assert torch.isfinite(batch.extend([3])).all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_blocks_in_a_file_take_no_memory_and_are_read_back(name, tmp_path):
    llm, (tokens,) = long_llm(name), random_rows(100)
    _, blocks = blocks_of(prefilled(llm, tokens))
    stored = [block.in_file(TensorFile(tmp_path)) for block in blocks]
    assert not any(block.bytes for block in stored)
    expected = filled(llm, tokens, blocks).extend([3])
    assert torch.equal(filled(llm, tokens, stored).extend([3]), expected)


def test_blocks_lack_removed_attention_and_plans_without_more_of_it_use_them():
    llm, (tokens,) = long_llm(), random_rows(70)
    llm.apply(Plan.removing("layer00.attn"))
    cached = prefilled(llm, tokens)
    assert cached.cached_row(0).absent == {0}
    llm.apply(Plan())
    _, blocks = blocks_of(prefilled(llm, tokens))
    llm.apply(Plan.removing("layer01.attn"))
    batch = filled(llm, tokens, blocks)
    expected = prefilled(llm, tokens)
    torch.testing.assert_close(batch.extend([3]), expected.extend([3]), rtol=1e-4, atol=1e-4)


def test_later_tokens_of_a_row_do_not_change_its_blocks():
    llm, (tokens,) = long_llm(), random_rows(70)
    for plan in (Plan(), uniform("int4")):
        llm.apply(plan)
        batch = prefilled(llm, tokens)
        _, blocks = blocks_of(batch)
        before = [[tensor.clone() for tensor in block.tensors] for block in blocks]
        for step in range(40):
            batch.extend([3 + step])
        for block, copies in zip(blocks, before, strict=True):
            assert all(map(torch.equal, block.tensors, copies))


def test_in_bfloat16_text_after_a_kept_beginning_is_as_likely_as_without_keeping():
    llm = load_llm("tiny-deep", dtype="bfloat16")
    config = CorpusConfig(source=TINY_HELD_OUT, windows=2, window_tokens=128)
    corpus = load_corpus(config, llm)

    def nll(batch, tokens):
        losses = []
        for token, following in itertools.pairwise(tokens):
            losses.append(-batch.extend([token])[0].log_softmax(-1)[following])
        return torch.stack(losses)

    rises = []
    for window in corpus.tokens.tolist():
        earlier = LiveBatch(llm, most_tokens=16)
        earlier.prefill([window[:90]])
        _, blocks = blocks_of(earlier)
        kept, fresh = filled(llm, window[:75], blocks), LiveBatch(llm, most_tokens=40)
        kept.append([window[75:100]])
        fresh.prefill([window[:100]])
        rises.append(nll(kept, window[100:]) - nll(fresh, window[100:]))
    assert torch.stack(rises).mean().abs() <= 0.001
