"""The benchmarks of a live model on a tiny one: what they count, and that they end in a record."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from benchmarks import apply, decode, live, load, memory, repair
from benchmarks.decode_step import ORDERS, Decoding, MemoryTraffic
from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import load_pruned, save_pruned
from rap_env.request import Request
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama_tied", layers=LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _record(path):
    (file,) = path.glob("*.json")
    return json.loads(file.read_text())


class TestMemoryTraffic:
    def test_a_tied_head_is_read_once_and_a_separate_embedding_by_its_row(self):
        tied, separate = tiny_llm("llama_tied"), tiny_llm("llama")
        rows, width = separate.model.get_input_embeddings().weight.shape
        assert MemoryTraffic(tied, 8).rest_bytes == tied.facts.base_bytes
        assert (
            MemoryTraffic(separate, 8).rest_bytes
            == separate.facts.base_bytes - (rows - 1) * width * 4
        )

    def test_every_block_counts_its_weights_and_an_attention_its_cache(self):
        llm = tiny_llm("llama")
        short, long = MemoryTraffic(llm, 1), MemoryTraffic(llm, 9)
        grown = [b - a for a, b in zip(short.block_bytes, long.block_bytes, strict=True)]
        assert grown == [8 * llm.facts.kv_bytes_per_token[0], 0] * 2
        dense = short.step_bytes(BlockMask())
        assert dense == short.rest_bytes + sum(short.block_bytes)
        assert short.step_bytes(BlockMask.of(1)) == dense - llm.facts.block_param_bytes[1]

    @pytest.mark.parametrize("order", ORDERS)
    def test_a_mask_frees_about_the_requested_share(self, order):
        traffic = MemoryTraffic(tiny_llm("llama", layers=8), 8)
        mask = traffic.mask(order, 0.25)
        one = max(traffic.block_bytes) / traffic.step_bytes(BlockMask())
        assert abs(traffic.share(mask) - 0.25) <= one / 2
        if order == "ffn":
            assert not mask.count("attn")
        if order == "even":
            assert abs(mask.count("attn") - mask.count("ffn")) <= 1


class TestDecoding:
    def test_the_cache_grows_by_a_token_a_step_under_its_own_mask(self):
        llm, mask = tiny_llm("llama"), BlockMask.of("layer00.attn")
        decoding = Decoding(llm, mask, 2, 5)
        decoding.steps(3)
        assert decoding.cache.get_seq_length() == 8
        request = Request(2, 8, budget_bytes=2**62)
        assert decoding.kv_bytes() == MemoryModel(llm).breakdown(mask, request).kv_cache
        assert llm.mask == BlockMask()

    def test_chunks_of_a_prompt_give_the_cache_of_the_whole(self, monkeypatch):
        llm = tiny_llm("llama")
        whole = Decoding(llm, BlockMask(), 2, 12).cache
        monkeypatch.setattr("benchmarks.decode_step.PREFILL_CHUNK_TOKENS", 10)  # 5 of each sequence
        parts = Decoding(llm, BlockMask(), 2, 12).cache
        for one, other in zip(whole.layers, parts.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys)


def test_apply_writes_a_record_with_its_ratio(folder, tmp_path):
    settings = apply.ApplySettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder),
        blocks=2, context_tokens=8, steps=2, changes=10,
    )  # fmt: skip
    apply.main(settings)
    record = _record(tmp_path)
    found = record["measured"]
    share = 100 * found["change_s"]["low"] / found["decode_step_s"]["high"]
    assert 0 < share <= record["targets"][0]["reached"]


def test_live_writes_a_record_of_seconds_and_freed_bytes(folder, tmp_path):
    settings = live.LiveSettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder),
        blocks=3, context_tokens=8, steps=2, refill_tokens=[4, 8], offloaded=[1, 2 * LAYERS],
    )  # fmt: skip
    live.main(settings)
    record = _record(tmp_path)
    measured = record["measured"]
    assert set(measured["refill"]) == {"4", "8"}
    assert 0 < measured["switch"]["remove_s"]["low"] <= measured["switch"]["remove_s"]["high"]
    predicted = [row["predicted_bytes"] for row in measured["offload"].values()]
    blocks = load_llm(folder).blocks
    assert predicted[-1] == sum(block.param_bytes for block in blocks)
    assert len(record["targets"]) == 4


def test_decode_writes_a_record_for_every_order_and_share(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_READ_BYTES", 2**16)
    settings = decode.DecodeSettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder),
        context_tokens=16, steps=2, shares=[0.2, 0.4],
    )  # fmt: skip
    decode.main(settings)
    record = _record(tmp_path)
    masks = record["measured"]["masks"]
    assert {f"{order} {share}" for order in ORDERS for share in ("20%", "40%")} < masks.keys()
    assert masks["no block"]["attn_removed"] == masks["no block"]["ffn_removed"] == LAYERS
    assert masks["dense"]["of_proportional"]["median"] == 1.0
    assert len(record["targets"]) == len(ORDERS)
    assert "a plain read of memory" in record["notes"][1]


def test_repair_counts_stubs_as_kept_bytes(folder, tmp_path):
    settings = repair.RepairSettings(
        repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder), fit_tokens=64,
        held_back_tokens=32, window_tokens=16, rank=2, context_tokens=16, steps=2, shares=[0.4],
        fits=1,
    )  # fmt: skip
    repair.main(settings)
    record = _record(tmp_path)
    side = record["measured"]["decode"]["40%"]
    llm = load_llm(folder)
    plain = MemoryTraffic(llm, 16)
    mask = plain.mask("even", 0.4)
    assert side["blocks_removed"] == len(mask)
    assert 0 < side["bytes_share_removed"] < plain.share(mask)
    assert record["measured"]["library_bytes"] <= 2 * LAYERS * (2 * 2 * 16 + 16) * 4
    assert [target["at_least"] or target["at_most"] for target in record["targets"]] == [0.9, 180.0]


def test_the_worst_mask_of_an_order_decides():
    def side(of_proportional: float, share: float) -> dict[str, object]:
        spread = dict.fromkeys(("median", "low", "high"), of_proportional)
        return {"bytes_share_removed": share, "of_proportional": spread}

    measured = {"ffn 20%": side(0.95, 0.21), "ffn 40%": side(0.8, 0.39), "attn 40%": side(0.1, 0.4)}
    target = decode._target("ffn", measured, [0.2, 0.4])
    assert (target.reached, target.met) == (0.8, False)
    assert "ffn alone (worst at x = 39%)" in target.what


class TestMemory:
    @pytest.mark.parametrize("removed", [(), ("layer00.attn", "layer02.ffn")])
    def test_weights_and_cache_of_a_pruned_model_are_as_predicted(self, removed, tmp_path):
        llm, mask = tiny_llm("llama_tied", layers=LAYERS), BlockMask.of(*removed)
        request = Request(2, 12, budget_bytes=2**62)
        predicted = MemoryModel(llm).breakdown(mask, request)
        pruned = load_pruned(save_pruned(llm, mask, tmp_path / "pruned"))
        found = memory.measure(pruned, request, steps=2)
        assert found["weights_bytes"] == predicted.weights + predicted.embeddings
        assert found["kv_cache_bytes"] == predicted.kv_cache
        held = found["weights_bytes"] + found["kv_cache_bytes"]
        logits = 2 * llm.facts.vocab_size * 4
        assert held + logits <= found["peak_bytes"] < 2 * held

    def test_the_benchmark_writes_a_record(self, folder, tmp_path):
        settings = memory.MemorySettings(
            repeats=2, threads=1, results_dir=str(tmp_path), model=str(folder),
            dtype="float32", requests=["1x8", "2x12"], steps=2,
        )  # fmt: skip
        memory.main(settings)
        record = _record(tmp_path)
        weights, cache, peak = record["targets"]
        assert (weights["reached"], cache["reached"]) == (0, 0)
        off = [abs(cell["peak_off"]) for cell in record["measured"]["cells"].values()]
        assert peak["reached"] == pytest.approx(100 * max(off))
        assert len(off) == 8

    def test_a_request_without_a_prompt_is_rejected(self):
        with pytest.raises(InvalidRequestError, match="longer than its answer of 4 tokens"):
            memory.measure(tiny_llm("llama"), Request(1, 4, budget_bytes=2**62), steps=4)

    @pytest.mark.parametrize("text", ["8", "8x", "axb", "1x2x3"])
    def test_a_request_that_cannot_be_read(self, text):
        with pytest.raises(InvalidRequestError, match="written like 4x1024"):
            memory._request(text)


def test_a_new_process_is_measured_with_its_threads_and_processor_seconds():
    seconds: list[float] = []
    code = "import os, sys; sys.exit(int(os.environ['OMP_NUM_THREADS']) - int(sys.argv[1]))"
    load._process(code, ["3"], 3, seconds)()
    assert len(seconds) == 1
    assert 0 < seconds[0] < 10
    with pytest.raises(subprocess.CalledProcessError):
        load._process(code, ["4"], 3, seconds)()


@pytest.mark.slow
def test_load_measures_processes_that_load_the_same(folder, tmp_path):
    load.main(load.LoadSettings(repeats=1, threads=1, results_dir=str(tmp_path), model=str(folder)))
    record = _record(tmp_path)
    assert record["measured"].keys() == {"rap_env", "transformers"}
    assert record["targets"][0]["reached"] == record["measured"]["rap_env"]["wall_s"]["median"]
    assert all(side["cpu_s"]["repeats"] == 1 for side in record["measured"].values())
