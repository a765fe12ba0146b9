"""Lowered caches get better levels back from copies in files, without computing."""

from itertools import chain, repeat

import pytest
import torch

from rap_env.levels import GROUP_TOKENS
from rap_env.models.caches.kv_cache import PassInterruptedError
from rap_env.models.caches.tensor_file import TensorFile
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.models.grouped import LEVELS, long_llm, random_rows, uniform

EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS)


def copied(llm, folder, rows, **settings) -> LiveBatch:
    batch = LiveBatch(llm, copies=folder, **settings)
    batch.prefill(rows)
    return batch


def native(llm, rows) -> LiveBatch:
    batch = LiveBatch(llm)
    batch.prefill(rows)
    return batch


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def states(batch: LiveBatch) -> list[torch.Tensor]:
    """Keys and values of each layer, with zeros for padding."""
    (part,) = batch._parts
    made = [torch.stack([layer.keys, layer.values]) for layer in part.cache.layers]
    for layer in made:
        for row, length in enumerate(part.lengths):
            layer[:, row, :, : layer.shape[3] - length] = 0
    return made


def computing_fails(*_args, **_kwargs):
    raise AssertionError("a cache was computed again")


@pytest.fixture(autouse=True)
def no_refill(monkeypatch):
    monkeypatch.setattr("rap_env.models.live.live_batch.refill", computing_fails)


@EVERY_LEVEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_lowered_comes_back_exactly(level, dtype, tmp_path):
    llm, rows = long_llm(dtype=dtype), random_rows(131, 64, 7)
    batch = copied(llm, tmp_path, rows)
    before = batch.kv_bytes
    for other in (level, "int8"):
        llm.apply(uniform(other))
        assert batch.kv_bytes < before
    llm.apply(Plan())
    assert batch.lowest_plan == Plan()  # nothing is lowered for long
    assert torch.equal(batch.extend([3, 4, 5]), native(llm, rows).extend([3, 4, 5]))
    assert batch.plans == [Plan()] * 3
    assert list(tmp_path.iterdir()) == []  # files have no names


@EVERY_LEVEL
def test_tokens_that_came_meanwhile_are_copied_too(level, tmp_path):
    llm, rows = long_llm(), random_rows(90, 60)
    batch = copied(llm, tmp_path, rows)
    llm.apply(uniform(level))
    more = random_rows(70, 70, seed=1)
    batch.append([row[:30] for row in more])  # finished groups in a chunk
    for column in range(30, 70):
        batch.extend([row[column] for row in more])
    late = copied(llm, tmp_path, random_rows(75, seed=2))  # it was never native
    llm.apply(Plan())
    late.extend([9]), batch.extend([3, 4])
    assert (batch.plans, late.plans) == ([Plan()] * 2, [Plan()])
    expected = native(llm, [row + new for row, new in zip(rows, more, strict=True)])
    expected.extend([3, 4])
    (first, second), (expected_first, expected_second) = states(batch), states(expected)
    close(first, expected_first)  # the first block's keys and values depend on no cache
    assert second.shape == expected_second.shape
    assert not torch.allclose(second, expected_second, atol=1e-4)
    if level == "int8":
        assert (second - expected_second).std() < 0.02 * expected_second.std()


def test_rows_keep_their_copies_where_they_join_and_leave(tmp_path):
    llm, rows = long_llm(), random_rows(90, 60, 75)
    batch = copied(llm, tmp_path, [rows[0], rows[2]])
    single = copied(llm, tmp_path, [rows[1]])
    llm.apply(uniform("int2"))
    batch.keep([1, 0])
    batch.join(single)
    llm.apply(Plan())
    expected = native(llm, [rows[2], rows[0], rows[1]])
    close(batch.extend([1, 2, 3]), expected.extend([1, 2, 3]))


def test_a_level_between_is_that_of_native_tokens(tmp_path):
    llm, rows = long_llm(), random_rows(90, 60)
    batch = copied(llm, tmp_path, rows)
    expected = native(llm, rows)
    llm.apply(uniform("int8"))
    logits = expected.extend([3, 4])
    expected.close()
    llm.apply(uniform("int2"))
    llm.apply(uniform("int8"))
    assert torch.equal(batch.extend([3, 4]), logits)
    assert batch.plans == [uniform("int8")] * 2
    llm.apply(Plan())  # it still has the native copies
    batch.extend([5, 6])
    close(states(batch)[0][..., :-2, :], states(native(llm, rows))[0])


def test_an_interrupted_chunk_leaves_the_copies_of_its_repetition(tmp_path):
    stops = chain([False] * 2, [False, True], repeat(False))  # 2 layers, in each pass
    llm = long_llm()
    llm.apply(uniform("int4"))
    batch = copied(llm, tmp_path, random_rows(70), interrupt=lambda: next(stops))
    with pytest.raises(PassInterruptedError):
        batch.append(random_rows(60, seed=1))
    batch.append(random_rows(40, seed=2))
    llm.apply(Plan())
    batch.extend([3])
    row = random_rows(70)[0] + random_rows(40, seed=2)[0] + [3]
    close(states(batch)[0], states(native(llm, [row]))[0])


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_without_a_disk_rows_stay_lowered(call, tmp_path, monkeypatch, caplog):
    llm, rows = long_llm(), random_rows(90, 60)
    batch = copied(llm, tmp_path, rows)

    def full(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr(f"rap_env.models.caches.tensor_file.os.{call}", full)
    llm.apply(uniform("int8"))
    batch.extend([3, 4])
    llm.apply(Plan())
    batch.extend([3, 4])
    assert batch.plans == [uniform("int8")] * 2
    assert batch.lowest_plan == uniform("int8")
    assert "No space left" in caplog.text
    assert len(caplog.records) <= 2 * 2  # one for each file or layer, not one for each step


def test_a_sliding_window_has_no_copies(tmp_path):
    llm = long_llm("gemma3_text")
    batch = copied(llm, tmp_path, random_rows(90))
    llm.apply(uniform("int8"))
    llm.apply(Plan())
    batch.extend([3])
    sliding = [layer.is_sliding for layer in batch._parts[0].cache.layers]
    assert sliding == [True, False]
    assert batch.plans == [Plan.of({"layer00.cache": "int8"})]


def test_a_file_gives_back_what_was_written(tmp_path):
    file = TensorFile(tmp_path)
    tensors = [torch.rand(3, 700, 700), torch.arange(GROUP_TOKENS).bfloat16()]
    begins = [file.append(tensor) for tensor in tensors]
    for begin, tensor in zip(begins, tensors, strict=True):
        assert torch.equal(file.read(begin, tensor.shape, tensor.dtype, tensor.device), tensor)
    with pytest.raises(OSError, match="shorter"):
        file.read(begins[1], torch.Size((100,)), torch.float32, torch.device("cpu"))
