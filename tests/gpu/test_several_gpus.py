"""A model that accelerate spreads over two GPUs gives what it gives on the CPU."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from rap_env.errors import MemorySourceError, UnsupportedModelError
from rap_env.importance.one_shot_scores import block_influence
from rap_env.memory import MemoryModel
from rap_env.models.families.adapter import adapter_for
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy
from rap_env.policies.uniform import uniform_plans
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.memory_meter import CudaMeter
from rap_env.scoring.likelihoods import ContinuationScorer
from rap_env.scoring.scorer import MaskScorer
from tests.gpu.paths import (
    PATHS,
    TOKENS,
    llm_of,
    ordered,
    repaired,
    scored,
    served,
)
from tests.gpu.pretended import GPU, GPUS, SECOND_GPU, pretended_gpu
from tests.tiny import LAYERS, tiny_model


def spread(model, adapter):
    """Let accelerate put a model's last layer and all that follows on the second GPU."""
    layers = list(adapter.layers(model))
    device_map, place = {}, 0
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done in device_map):
            continue
        place = 1 if module is layers[-1] else place
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if module in layers or own:
            device_map[name] = place
    return dispatch_model(model, device_map)


def spread_llm(name, layers=LAYERS):
    model = tiny_model(name, layers=layers)
    return ElasticLLM(spread(model, adapter_for(model.config)), None, name=name)


def lowered(llm, residencies=("resident", "offload")):
    """Weights at levels, those of embeddings and head included."""
    levels = {0: "int8", 3: "int4"}
    plan = Plan(weights=tuple(levels.items()), embeddings="int8")
    found = [scored(llm, 16)]
    for residency in residencies:
        llm.set_residency(residency)
        for applied in (plan, Plan.removing(1, 2), Plan()):
            llm.apply(applied)
            with torch.no_grad():
                logits = llm.model(input_ids=TOKENS[:2].to(llm.device)).logits
            found.append(logits.cpu().numpy().ravel())
    return np.concatenate(found)


def looked_up(llm):
    requests = [([5, 6, 7], [8, 9]), ([5, 6], [3]), ([4], [2, 3, 4])]
    return ContinuationScorer(llm, requests, 64).run().ravel()


def influence(llm):
    return block_influence(MaskScorer(llm, TOKENS))


ALL_PATHS = {
    **PATHS,
    "importance": ordered,
    "influence": influence,
    "likelihoods": looked_up,
    "repair": repaired,
    "engine": served,
    "levels of weights": lowered,
}


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "mixtral"))]
)
def test_every_path_gives_what_it_gives_on_the_cpu(name):
    """The head is beside the last layer (llama, mixtral) or, tied, beside the embeddings."""
    for path, run in ALL_PATHS.items():
        expected = run(llm_of(name, "cpu"))
        with pretended_gpu(2):
            found = run(spread_llm(name))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3, err_msg=path)


def test_each_block_its_cache_and_its_stub_stay_on_the_device_of_the_block():
    with pretended_gpu(2):
        llm = spread_llm("llama")
        assert (llm.device, llm.devices, llm.head_device) == (GPU, GPUS, SECOND_GPU)
        assert [llm.device_of(block) for block in range(4)] == [*[GPU] * 2, *[SECOND_GPU] * 2]
        assert not any(hasattr(module, "_hf_hook") for module in llm.model.modules())

        def places():
            layers = llm.adapter.layers(llm.model)
            return [{weight.device for weight in layer.parameters()} for layer in layers]

        llm.set_residency("offload")
        for plan in (Plan.removing(0, 3), Plan(weights=((1, "int8"), (2, "int8")))):
            llm.apply(plan)
            llm.apply(Plan())
            assert places() == [{GPU}, {SECOND_GPU}]
        batch = LiveBatch(llm)
        assert batch.prefill([[5, 6, 7], [8]]).device == SECOND_GPU
        batch.keep([1])
        batch.extend([4])
        (part,) = batch._parts
        assert [layer.keys.device for layer in part.cache.layers] == [GPU, SECOND_GPU]


def test_dropped_weights_are_read_again_to_their_devices(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    found = []
    for count in (0, 2):
        with pretended_gpu(2):
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
            model = spread(model, adapter_for(model.config)) if count else model
            llm = ElasticLLM(model, None, name="llama", folder=tmp_path)
            assert len(llm.devices) == max(1, count)
            found.append(lowered(llm, ["drop"]))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)


def test_what_layers_share_crosses_between_devices_once_in_a_step():
    crossings = []
    with pretended_gpu(2) as seen:
        for layers in (2, 4):
            model = tiny_model("llama", layers=layers)
            model.model.layers[-layers // 2 :].to(SECOND_GPU)
            model.model.norm.to(SECOND_GPU)
            model.lm_head.to(SECOND_GPU)
            model.model.embed_tokens.to(GPU)
            model.model.layers[: layers // 2].to(GPU)
            batch = LiveBatch(ElasticLLM(model, None, name="llama"))
            batch.prefill([[5, 6, 7, 8]])
            before = seen.crossings
            batch.extend([3])
            crossings.append(seen.crossings - before)
    assert crossings[0] == crossings[1] <= 4  # the hidden state, positions and two rotary tables


def test_bytes_are_those_of_all_devices_together():
    with pretended_gpu(2):
        llm = spread_llm("llama")
        expected = llm_of("llama", "cpu").held_bytes
        assert llm.held_bytes == expected
        allocated = {GPU: 2000 + expected.total, SECOND_GPU: 500}
        torch.cuda.memory_allocated.side_effect = allocated.get
        meter = CudaMeter(llm)
        allocated[SECOND_GPU] += 70
        assert meter.used_bytes() == expected.total + 70


def test_what_cannot_work_on_several_devices_is_refused(tmp_path):
    with pretended_gpu(2):
        model = tiny_model("llama")
        model.model.layers[1].to(GPU)
        with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, cuda:0\)"):
            ElasticLLM(model, None, name="half on the CPU")
        model.to(GPU)
        model.model.layers[1].mlp.to(SECOND_GPU)
        with pytest.raises(UnsupportedModelError, match=r"layer 1 are on 2 devices .*layer whole"):
            ElasticLLM(model, None, name="a layer in two")
        llm = spread_llm("llama")
        with pytest.raises(UnsupportedModelError, match="its layers are on several devices"):
            llm.model.to(GPU)
        memory = MemorySourceError, "cuda:0, cuda:1, whose free memory is not one number"
        policy = OrderPolicy(MemoryModel(llm), (), uniform_plans(llm.facts))
        with pytest.raises(memory[0], match=memory[1]):
            RuntimeController(llm, policy, "auto")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.layers": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "work"
    )
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, disk\)"):
        ElasticLLM(model, None, name="offloaded")
