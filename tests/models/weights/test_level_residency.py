"""Levels of weights that are not in use leave memory, and come back bit for bit."""

import gc
import mmap
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.residency import Residency, WeightStore
from rap_env.models.weights.tensors import named_weights, tensor_key
from rap_env.models.weights.weight_levels import WeightItem
from rap_env.paths import cache_dir
from rap_env.plan import Plan
from rap_env.request import Request
from tests.models.states import apply_to, damage_file, logits, opened, saved, weights_hash
from tests.tiny import DISTINCT_FAMILIES, LAYERS, each_family, tiny_llm

REQUEST = Request(1, 8, 1)
INT8 = Plan.uniform(LAYERS, weights="int8", embeddings="int8")
INT4 = Plan.uniform(LAYERS, weights="int4", embeddings="int8")
MIXED = Plan.of(
    {"layer00.attn": "int8", "layer00.ffn": "int4", "layer01.ffn": "removed", "embeddings": "int4"}
)
PLANS: list[Plan] = [
    INT4,
    Plan.removing(1, 2),
    MIXED,
    INT8,
    INT8.without(*range(2 * LAYERS)),
    INT4.without(0),
    Plan(),
    MIXED,
]


def offloaded() -> ElasticLLM:
    llm = tiny_llm()
    llm.set_residency("offload")
    return llm


def tensor_bytes(llm: ElasticLLM) -> int:
    """Bytes of all tensors of weights in memory, of the model and of what stands aside."""
    tensors = [tensor for _, tensor in named_weights(llm.model)]
    for site in llm.sites:
        tensors += [tensor for part in site.modules for _, tensor in named_weights(part)]
    for item in llm.weight_items:
        tensors += [tensor for place in item.places for tensor in place.weights.values()]
        tensors += [tensor for level in item.made for tensor in item.tensors(level).values()]
    return sum(key[-1] for key in {tensor_key(tensor) for tensor in tensors})


@each_family("name", DISTINCT_FAMILIES, dtype=[torch.float32, torch.bfloat16])
def test_held_bytes_are_those_of_the_plan(name: str, dtype: torch.dtype) -> None:
    llm, resident = tiny_llm(name, dtype=dtype), tiny_llm(name, dtype=dtype)
    llm.set_residency("offload")
    memory, before = MemoryModel(llm), weights_hash(llm.model)
    for plan in PLANS:
        apply_to(plan, llm, resident)
        parts = memory.breakdown(plan, REQUEST)
        assert llm.held_bytes.weights == parts.weights + parts.embeddings == tensor_bytes(llm)
    llm.apply(Plan())
    assert weights_hash(llm.model) == before


def test_resident_weights_stay_in_memory_at_every_level_used() -> None:
    llm = tiny_llm()
    native = llm.held_bytes.weights
    for plan in (INT8, INT4, Plan(), INT8):
        llm.apply(plan)
    assert llm.held_bytes.weights == tensor_bytes(llm) > native


def test_what_was_read_of_a_file_is_freed_with_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        alive: ClassVar[weakref.WeakSet["Pages"]] = weakref.WeakSet()

        def __new__(cls, *args: Any, **kwargs: Any) -> "Pages":
            pages = super().__new__(cls, *args, **kwargs)
            cls.alive.add(pages)
            return pages

    offloaded().apply(INT4)  # it writes the files
    llm = offloaded()
    llm.apply(Plan())
    monkeypatch.setattr(mmap, "PAGESIZE", 1)  # the weights of a tiny model have pages too
    monkeypatch.setattr(mmap, "mmap", Pages)
    with torch.enable_grad():
        llm.apply(INT4.without(0, 1, 2))
        assert Pages.alive
        llm.apply(Plan.removing(*range(2 * LAYERS)))
    gc.collect()
    held = llm.held_bytes.weights
    assert sum(len(pages) for pages in Pages.alive) <= held, "only what is in memory"


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "gpt2", "opt", "phi3"])
def test_dropped_weights_are_read_and_made_again(tmp_path: Path, name: str) -> None:
    llm, plain = opened(saved(tmp_path, name)), tiny_llm(name, dtype=torch.bfloat16)
    llm.set_residency("drop")
    memory = MemoryModel(llm)
    for plan in PLANS:
        apply_to(plan, llm, plain)
        parts = memory.breakdown(plan, REQUEST)
        assert llm.held_bytes.weights == parts.weights + parts.embeddings == tensor_bytes(llm)
    assert not (cache_dir() / "offloaded").exists()


def test_weights_are_freed_before_others_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = offloaded()
    for plan in (INT8, INT4, MIXED):  # every level is made
        llm.apply(plan)
    most = [llm.held_bytes.weights]
    put = WeightItem.put

    def noted(item: WeightItem, level: str) -> None:
        most.append(llm.held_bytes.weights)
        put(item, level)

    monkeypatch.setattr(WeightItem, "put", noted)
    for plan in PLANS:
        before = llm.held_bytes.weights
        most.clear()
        llm.apply(plan)
        assert max(most, default=0) <= max(before, llm.held_bytes.weights)


def test_a_level_is_written_once_and_read_by_later_processes_unless_it_is_damaged(monkeypatch):
    first = offloaded()
    first.apply(INT4)
    files = {path: path.stat().st_mtime_ns for path in cache_dir().rglob("*.int*.safetensors")}
    assert len(files) == 2 * LAYERS + 1
    with monkeypatch.context() as patched:
        patched.setattr(WeightItem, "quantise", None)  # nothing is made again
        apply_to(INT4, first, offloaded())
    assert files == {path: path.stat().st_mtime_ns for path in files}
    for path in files:
        damage_file(path, "changed")
    apply_to(INT4, first, offloaded())


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_level_whose_file_cannot_be_read_is_made_again(how: str) -> None:
    llm, plain = offloaded(), tiny_llm()
    llm.apply(INT4)
    llm.apply(Plan())
    for name in ("block002.int4*", "embeddings.int8*"):
        damage_file(next(cache_dir().rglob(name)), how)
    for plan in (INT4, Plan(embeddings="int8"), Plan(), INT4):
        apply_to(plan, llm, plain)
        assert llm.held_bytes.weights == tensor_bytes(llm)


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
@pytest.mark.parametrize("present", [Plan(), Plan(embeddings="int8"), MIXED])
def test_a_plan_stays_whole_while_files_cannot_be_read(present: Plan, how: str) -> None:
    llm, plain = offloaded(), tiny_llm()
    for plan in (INT4, Plan(), present):
        apply_to(plan, llm, plain)
    held_bytes = llm.held_bytes.weights
    files = [*cache_dir().rglob("*.safetensors")]
    contents = [file.read_bytes() for file in files]
    for file in files:
        damage_file(file, how)
    other = Plan() if present else INT4
    with pytest.raises((ModelNotAvailableError, ChecksumError)):
        llm.apply(other)
    assert llm.plan == present
    assert torch.equal(logits(llm), logits(plain))
    assert llm.held_bytes.weights == tensor_bytes(llm) == held_bytes
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    for plan in (other, present):
        apply_to(plan, llm, plain)


@pytest.mark.parametrize(
    "before", [Plan(), INT8.without(1), MIXED], ids=["native", "int8", "mixed"]
)
def test_a_plan_that_fails_half_way_leaves_the_one_before(before: Plan, monkeypatch) -> None:
    llm, plain = offloaded(), tiny_llm()
    for plan in (*PLANS, before):
        apply_to(plan, llm, plain)
    held_bytes = llm.held_bytes.weights
    load, calls = WeightStore.load, []

    def fails_once(self: WeightStore, item: WeightItem, level: str) -> None:
        calls.append(level)
        if len(calls) == 3:
            raise MemoryError("full")
        load(self, item, level)

    monkeypatch.setattr(WeightStore, "load", fails_once)
    with pytest.raises(MemoryError):
        llm.apply(INT4)
    assert llm.plan == before
    assert torch.equal(logits(llm), logits(plain))
    assert llm.held_bytes.weights == tensor_bytes(llm) == held_bytes
    for plan in (INT4, Plan()):
        apply_to(plan, llm, plain)


def test_blocks_are_removed_of_which_neither_plan_can_be_read(monkeypatch) -> None:
    llm, plain = offloaded(), tiny_llm()
    for plan in (INT4, Plan()):
        apply_to(plan, llm, plain)
    lost, load = llm.weight_items[2], WeightStore.load

    def fails(self: WeightStore, item: WeightItem, level: str) -> None:
        if item is lost:
            raise ModelNotAvailableError("gone meanwhile")
        load(self, item, level)

    with monkeypatch.context() as patched:
        patched.setattr(WeightStore, "load", fails)
        with pytest.raises(ModelNotAvailableError, match="gone meanwhile"):
            llm.apply(INT4)
    assert llm.plan == Plan.removing(2)
    plain.apply(llm.plan)
    assert torch.equal(logits(llm), logits(plain))
    for plan in (INT4, Plan()):
        apply_to(plan, llm, plain)


@pytest.mark.parametrize("plan", [INT4, MIXED], ids=["int4", "mixed"])
def test_the_residency_may_change_under_a_plan(tmp_path: Path, plan: Plan) -> None:
    llm, plain = opened(saved(tmp_path)), tiny_llm(dtype=torch.bfloat16)
    llm.apply(plan)
    plain.apply(plan)
    order: list[Residency] = ["offload", "resident", "drop", "offload", "resident"]
    for residency in order:
        llm.set_residency(residency)
        assert llm.plan == plan
        assert torch.equal(logits(llm), logits(plain))
        assert llm.held_bytes.weights == tensor_bytes(llm)
    for other in (Plan(), INT8, plan):
        apply_to(other, llm, plain)


@pytest.mark.parametrize("residency", ["resident", "offload", "drop"])
def test_levels_made_in_inference_mode_are_used_outside_of_it(tmp_path, residency) -> None:
    folder = saved(tmp_path)  # stored in bfloat16, so that loading converts
    llm, plain = opened(folder, torch.float32), opened(folder, torch.float32)
    llm.set_residency(residency)
    with torch.inference_mode():
        for plan in (INT4, Plan(), INT8, INT4):
            llm.apply(plan)
    plain.apply(INT4)
    for plan in (INT4, Plan(), INT8):
        apply_to(plan, llm, plain)
