"""A model that nothing refers to any more is freed at once, without a garbage collection."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.tensors import named_weights
from rap_env.plan import Plan
from tests.models.states import logits, saved
from tests.tiny import DISTINCT_FAMILIES, LAYERS, each_family

IDS = torch.tensor([[5, 9, 33, 4, 17, 2]])
INT4 = Plan.uniform(LAYERS, weights="int4", embeddings="int8")


@pytest.fixture(autouse=True)
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def generate(llm: ElasticLLM) -> None:
    llm.generate(IDS, max_new_tokens=2, do_sample=False)


def use_levels(llm: ElasticLLM) -> None:
    llm.apply(INT4)
    logits(llm)


def run_each_block(llm: ElasticLLM) -> None:
    forward = PartialForward(llm, widen=True)
    state = forward.enter(IDS)
    for layer in forward.layer_steps:
        with forward.loaded(layer):
            for step in layer:
                state = forward.run(step, state)
    forward.leave(state)


def offload(llm: ElasticLLM) -> None:
    llm.set_residency("offload")
    use_levels(llm)


def read_all(llm: ElasticLLM) -> None:
    llm.apply(Plan())
    logits(llm)


USES: dict[str, tuple[bool, Callable[[ElasticLLM], object]]] = {
    "native": (False, logits),
    "generated": (False, generate),
    "levels": (False, use_levels),
    "block by block": (False, run_each_block),
    "offloaded": (False, offload),
    "on demand": (True, run_each_block),
    "on demand, levels": (True, use_levels),
    "on demand, all blocks": (True, read_all),
}


@each_family("family", DISTINCT_FAMILIES, use=USES)
def test_dropping_a_model_frees_its_tensors(
    tmp_path: Path, family: str, use: tuple[bool, Callable[[ElasticLLM], object]]
) -> None:
    on_demand, run = use
    llm = load_llm(
        saved(tmp_path / "m", family), device="cpu", dtype="float32", on_demand=on_demand
    )
    run(llm)
    assert llm.facts.num_blocks == 2 * LAYERS
    tensors = [weakref.ref(tensor) for _, tensor in named_weights(llm.model)]
    model = weakref.ref(llm.model)
    del llm
    assert tensors
    assert not any(tensor() is not None for tensor in tensors)
    assert model() is None


def test_also_the_first_model_of_a_process_is_freed(tmp_path: Path) -> None:
    """What transformers imports for it keeps no frame that holds the model."""
    program = (
        "import gc, weakref\n"
        "from rap_env.models.files.loading import load_llm\n"
        "gc.disable()\n"
        f"llm = load_llm({str(saved(tmp_path / 'm'))!r}, device='cpu', on_demand=True)\n"
        "model = weakref.ref(llm.model)\n"
        "del llm\n"
        "assert model() is None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
