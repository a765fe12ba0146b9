"""Every path gives on a pretended GPU what it gives on the CPU, for every family."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rap_env.errors import UnsupportedModelError
from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration import calibrate
from rap_env.models.live.calibration_text import generate_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.plan import Plan
from rap_env.runtime.sampling import RowSampler, SamplingParams, sample_rows
from rap_env.scoring.scorer import PlanScorer
from tests.gpu.paths import (
    PATHS,
    TOKENS,
    generated,
    influence,
    live,
    llm_of,
    looked_up,
    lowered,
    ordered,
    scored,
    served,
)
from tests.gpu.pretended import GPU, MEMORY_BYTES, on_gpu, pretended_gpu
from tests.models.states import saved
from tests.models.tiny_gguf import write_tiny_gguf
from tests.tiny import LAYERS, WIDE_FAMILIES, each_family, tiny_model

SOME_FAMILIES = ("llama", "mistral_sliding", "gpt_neox")


def test_it_raises_where_cuda_does():
    with pretended_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == GPU
        assert (there[:2] * 2).is_cuda
        assert here.cuda().device == here.to(there).device == torch.ones_like(there).device == GPU
        assert there.cpu().device.type == "cpu"
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there @ here):
            with pytest.raises(RuntimeError, match="tensors of cpu and cuda:0"):
                mixed()
        with pytest.raises(TypeError, match="no NumPy array"):
            there.numpy()
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]  # a number may be anywhere
        assert there[torch.tensor([0, 2])].is_cuda
        with pytest.raises(RuntimeError, match="a number of the CPU to change"):
            torch.tensor(0.0).add_(there.sum())
        there.copy_(here * 4)
        assert there.is_cuda
        assert there.cpu().numpy().tolist() == [4.0] * 3
    assert not torch.cuda.is_available()


@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_every_path_gives_what_it_gives_on_the_cpu(name, dtype):
    for path, run in PATHS.items():
        expected = run(llm_of(name, "cpu", dtype))
        with pretended_gpu():
            actual = run(llm_of(name, "cuda", dtype))
        rounding = 1e-4 if dtype == torch.float32 else 3e-2
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=rounding, err_msg=path)


@pytest.mark.parametrize("name", WIDE_FAMILIES)
def test_levels_of_few_bits_give_what_they_give_on_the_cpu(name):
    plans = [Plan.uniform(LAYERS, weights=n, embeddings=n) for n in LOW_BIT_FORMATS]

    def run(llm):
        llm.calibrator = lambda model: calibrate(model, TOKENS)
        return np.array([generated(llm, plan) for plan in plans])

    expected = run(llm_of(name, "cpu"))
    with pretended_gpu():
        actual = run(llm_of(name, "cuda"))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_the_number_of_masks_in_a_batch_depends_on_sizes_and_is_part_of_the_key():
    with pretended_gpu():
        llm = llm_of("llama", "cuda")
        first, again, single = (PlanScorer(llm, TOKENS, masks_together=n) for n in (None, None, 1))
        assert first.runner.width == again.runner.width > 1
        assert first.context == again.context != single.context
        state_bytes = TOKENS.numel() * llm.facts.hidden_size * llm.facts.itemsize
        torch.cuda.mem_get_info.return_value = (0, MEMORY_BYTES)
        assert PlanScorer(llm, TOKENS).runner.width == 1
        torch.cuda.memory_reserved.return_value = 200 * state_bytes
        assert PlanScorer(llm, TOKENS).runner.width == 4  # reserved, but not in use


def test_few_steps_wait_for_the_device():
    masks = [Plan.removing(first, second) for first in range(4) for second in range(4, 8)]
    with pretended_gpu() as waits:
        llm = ElasticLLM(tiny_model("llama", layers=4).to("cuda"), None, name="llama")
        scorer = PlanScorer(llm, TOKENS, masks_together=16)
        _ = scorer.native_nll
        before = waits.count
        scorer.nll_many(masks)
        assert waits.count - before <= 2  # transformers looks at a mask, and the scores are read
        for plan in (Plan(), Plan.uniform(4, caches="int4")):
            llm.apply(plan)
            for prompts in ([[5, 6, 7, 8]] * 8, [[5, 6, 7, 8], [9]] * 4):  # padded, and not
                batch = LiveBatch(llm)
                batch.prefill(prompts)
                before = waits.count
                logits = batch.extend([3] * 8)
                assert waits.count == before, (plan, prompts)
        params = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=1)
        sample_rows([RowSampler(params) for _ in range(8)], logits)
        assert waits.count == before + 1


@pytest.mark.parametrize(
    "name",
    [SOME_FAMILIES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SOME_FAMILIES[1:])],
)
@pytest.mark.parametrize("run", [ordered, influence, looked_up, lowered, served])
def test_what_is_built_on_them_gives_what_it_gives_on_the_cpu(name, run):
    expected = run(llm_of(name, "cpu"))
    with pretended_gpu():
        actual = run(llm_of(name, "cuda"))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def calibrated(device, _folder):
    """Scores with weights that a text has made, the second time from their files."""
    scores = []
    for _ in range(2):
        llm = ElasticLLM(tiny_model("llama", layers=1).to(device), None, name="llama")
        calibrate(llm, TOKENS[:2])
        scores.append(PlanScorer(llm, TOKENS).nll(Plan.uniform(1, weights="int4")))
    return scores


def own_text(device, _folder):
    """A text that the model writes; the pretended GPU draws the CPU's random numbers."""
    return generate_windows(llm_of("llama", device), 2, 8, 0)


def packed(device, folder):
    """A packed model that is served."""
    write_tiny_gguf(folder / "tiny.gguf", kind="Q8_0", hidden=64, ffn=96)
    llm = load_llm(folder / "tiny.gguf", device=device, dtype="float32")
    return live(llm, "offload")


def dropped(device, folder):
    """Weights that are read again."""
    tiny_model("llama").save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    return lowered(ElasticLLM(model, None, name="llama", folder=folder), ["drop"])


def from_files(device, folder):
    """Scores of a model that is loaded to the device."""
    llm = load_llm(saved(folder, dtype=torch.float32), device=device, dtype="float32")
    assert llm.device == torch.device("cuda:0" if device == "cuda" else "cpu")
    return scored(llm, 1)


@pytest.mark.parametrize("run", [calibrated, own_text, packed, dropped, from_files])
def test_what_is_in_files_gives_what_it_gives_on_the_cpu(run, tmp_path, monkeypatch):
    actual = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / f"cache-{device}"))
        (tmp_path / device).mkdir()
        with pretended_gpu():
            actual.append(np.asarray(run(device, tmp_path / device)))
    np.testing.assert_allclose(*actual, rtol=1e-4, atol=1e-4)


def test_other_processes_get_the_memory_of_blocks_that_are_removed():
    """The allocator would keep it; each step is measured when its kernels have ended."""
    with pretended_gpu():
        llm = llm_of("llama", "cuda")
        torch.cuda.empty_cache.reset_mock()
        torch.cuda.synchronize.reset_mock()
        served(llm)
        emptied, waited = torch.cuda.empty_cache.call_count, torch.cuda.synchronize.call_count
    assert emptied >= 2  # the plan changes at least twice
    assert waited >= 12  # decode steps


class CopiesToHost(TorchDispatchMode):
    """Counts copies from the pretended GPU into the host's memory, and those that wait."""

    copies = waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and on_gpu(args[1]) and not on_gpu(args[0]):
            self.copies += 1
            self.waits += not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking"))
        return func(*args, **(kwargs or {}))


def test_weights_go_to_the_host_in_few_copies_and_nothing_waits():
    """A block has two groups of weights: those that a lower level replaces, and the others."""
    with pretended_gpu():
        llm = llm_of("llama", "cuda")
        llm.set_residency("offload")
        with CopiesToHost() as seen:
            llm.apply(Plan.removing(0, 3))
        assert (seen.copies, seen.waits) == (2 * 2, 0)


def test_pinned_memory_of_offloaded_weights_is_taken_once():
    with pretended_gpu() as seen:
        llm = llm_of("llama", "cuda")
        llm.set_residency("offload")
        for _ in range(2):  # the copies of the first time are kept
            llm.apply(Plan.removing(*range(llm.num_blocks)))
            llm.apply(Plan())
        weights = sum(llm.facts.block_param_bytes)
        assert weights <= sum(seen.pinned) < 1.2 * weights


def test_a_model_whose_other_tensors_would_stay_behind_is_not_moved():
    llm = llm_of("llama", "cpu")
    llm.set_residency("offload")
    expected = scored(llm, 1)
    assert llm.model.to("cpu") is llm.model
    for move in (llm.model.half, lambda: llm.model.to(torch.bfloat16)):
        with pytest.raises(UnsupportedModelError, match="cannot be moved or converted"):
            move()
    with pretended_gpu(), pytest.raises(UnsupportedModelError, match="to cuda:0"):
        llm.model.to("cuda")
    np.testing.assert_array_equal(scored(llm, 1), expected)
    assert copy.deepcopy(llm.model).to("cpu") is not llm.model


def test_a_model_on_several_devices_is_refused(tmp_path):
    model = tiny_model("llama")
    with pretended_gpu():
        model.model.layers[1].to(GPU)
        with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, cuda:0\), but a"):
            ElasticLLM(model, None, name="half on the CPU")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.layers": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "work"
    )
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, disk\), but a model"):
        ElasticLLM(model, None, name="offloaded")
