"""Paths through a live model that must give on a GPU what they give on the CPU."""

import numpy as np
import torch

from rap_env.importance.gsi_search import gsi
from rap_env.importance.one_shot import block_influence
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.policies.loading import OrderPolicy
from rap_env.policies.uniform import uniform_plans
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape, MemoryEstimator
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.runtime.records import EngineSettings
from rap_env.runtime.sampling import SamplingParams
from rap_env.scoring.scorer import PlanScorer
from tests.tiny import LAYERS, VOCAB_SIZE, tiny_model

TOKENS = torch.randint(3, VOCAB_SIZE, (6, 40), generator=torch.Generator().manual_seed(0))
LOWERED = Plan.uniform(LAYERS, caches="int4-window32")
PLANS = [Plan(), Plan.removing(0), Plan.removing(1, 2), LOWERED, LOWERED.without(2)]


def llm_of(name, device, dtype=torch.float32):
    return ElasticLLM(tiny_model(name, dtype=dtype).to(device), None, name=name)


def generated(llm, plan):
    """The first logits of two rows, one of them padded; a second token is only run."""
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]).to(llm.device)
    shown = {"return_dict_in_generate": True, "output_logits": True}
    with llm.applied(plan):
        written = llm.generate(ids, attention_mask=ids.sign(), max_new_tokens=2, **shown)
    return written.logits[0].cpu().float().numpy()


def live(llm, residency):
    llm.set_residency(residency)
    batch, other = LiveBatch(llm), LiveBatch(llm)
    batch.prefill([[5, 6, 7, 8] * 10, [9, 10]])
    for plan in (Plan.removing(0, 3), LOWERED, Plan()):
        llm.apply(plan)
        batch.extend([3, 4])
        other.prefill([[11, 12, 13]])
        batch.join(other)
        batch.keep([2, 0])
    return batch.extend([5, 6]).cpu().float().numpy()


def scored(llm, together):
    return np.array(PlanScorer(llm, TOKENS, masks_together=together).nll_many(PLANS))


PATHS = {
    "generate": lambda llm: generated(llm, Plan.removing(0, 3)),
    "generate, lower caches": lambda llm: generated(llm, LOWERED),
    "live batch, resident": lambda llm: live(llm, "resident"),
    "live batch, offload": lambda llm: live(llm, "offload"),
    "scorer, one plan": lambda llm: scored(llm, 1),
    "scorer, many plans": lambda llm: scored(llm, 16),
}


def ordered(llm):
    """The first blocks of the exact order, and the NLL after each."""
    profile = gsi(PlanScorer(llm, TOKENS), stop=3, progress=False)
    return np.array([*profile.order_indices, *profile.nll_after])


def lowered(llm, residencies=("resident", "offload")):
    """Weights at levels, those of embeddings and head included."""
    levels = {0: "int8", 3: "int4"}
    plan = Plan(weights=tuple(levels.items()), embeddings="int8")
    actual = [scored(llm, 16)]
    for residency in residencies:
        llm.set_residency(residency)
        for applied in (plan, Plan.removing(1, 2), Plan()):
            llm.apply(applied)
            with torch.no_grad():
                logits = llm.model(input_ids=TOKENS[:2].to(llm.device)).logits
            actual.append(logits.cpu().numpy().ravel())
    return np.concatenate(actual)


def looked_up(llm):
    from rap_env.scoring.plan_lm import likelihoods, make_batches  # needs lm-eval

    requests = [([5, 6, 7], [8, 9]), ([5, 6], [3]), ([4], [2, 3, 4])]
    return likelihoods(PartialForward(llm, widen=True), make_batches(requests, 64)).ravel()


def influence(llm):
    return block_influence(PlanScorer(llm, TOKENS))


def served(llm):
    """Two answers, during which the budget falls below the native peak and rises again."""
    llm.set_residency("offload")
    estimator = MemoryEstimator(llm)
    memory = estimator.memory
    plans = uniform_plans(memory.facts)
    policy = OrderPolicy(memory, (3, 0, 2, 1), plans)
    low = estimator.peak_bytes(Plan.removing(0, 1, 3), BatchShape(2, 60))
    budget = [10**12]
    controller = RuntimeController(
        llm, policy, lambda: budget[0], meter=TensorMeter(llm), clock=lambda: 0.0
    )
    controller.headroom.hold_s = 0.0
    engine = Engine(controller, EngineSettings(max_batch_size=3, prefill_chunk_tokens=16))
    greedy = SamplingParams(max_new_tokens=12)
    handles = [engine.submit(TOKENS[row].tolist(), greedy) for row in range(2)]
    step = 0
    applied = set()
    while engine.step():
        step += 1
        budget[0] = low if 4 <= step < 8 else 10**12
        applied.add(llm.plan)
    engine.close()
    assert len(applied) > 1
    return np.array([handle.result().token_ids for handle in handles])
