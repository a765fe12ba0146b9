"""Models whose blocks are read from their files when a plan needs them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rap_env.errors import ChecksumError, UnsupportedModelError
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from tests.models.states import logits, saved, saved_packed, tensor_bytes
from tests.tiny import each_family, tiny_llm, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 33, 4, 17, 2]])
NOTHING = Plan.removing(0, 1, 2, 3)
SAVE = {"unquantised": saved, "packed": saved_packed}
MIXTURES = ("mixtral", "qwen2_moe")
"""Families whose unquantised files have single experts, so that they are loaded whole."""


def loaded(folder: Path, **options: Any) -> ElasticLLM:
    return load_llm(folder, **{"device": "cpu", "dtype": "float32", "on_demand": True, **options})


def layer(llm: ElasticLLM, number: int) -> Any:
    """Only one layer is in memory in a ``with`` block."""
    others = {index for index in range(llm.num_blocks) if index // 2 != number}
    return llm.applied(Plan(frozenset(others)))


def layer_by_layer(llm: ElasticLLM, plan: Plan = Plan()) -> torch.Tensor:
    """Logits under a plan, (T, V)."""
    forward = PartialForward(llm)
    state = forward.enter(IDS)
    for step in forward.steps:
        with layer(llm, step[0] // 2):
            state = forward.run(step, state, plan)
    return forward.logits(forward.leave(state)[0])


def rest_bytes(llm: ElasticLLM) -> int:
    """Bytes of what is always in memory: packed embeddings, and norms outside of blocks."""
    unread = llm.facts.weights == "unquantised"
    return llm.facts.base_bytes - unread * llm.weight_items[-1].native_bytes


@each_family("family", save=SAVE, dtype=["float32", "bfloat16"])
def test_it_computes_what_the_whole_model_does(tmp_path, family, save, dtype) -> None:
    folder = save(tmp_path / "m", family)
    whole = load_llm(folder, device="cpu", dtype=dtype)
    llm = loaded(folder, dtype=dtype)
    if save is saved and family in MIXTURES:
        assert llm.plan == Plan()
        assert torch.equal(logits(llm), logits(whole))
        return
    assert llm.plan == NOTHING
    assert llm.residency == "drop"
    assert llm.fingerprint == whole.fingerprint
    assert llm.facts == whole.facts
    levels = [level for level in ("int8", "int4") if level in whole.facts.weight_levels(3)]
    for plan in (Plan(), *(Plan(weights=((0, level), (3, level))) for level in levels)):
        assert torch.equal(layer_by_layer(llm, plan), layer_by_layer(whole, plan))
        assert llm.held_bytes.weights == tensor_bytes(llm.model) == rest_bytes(llm)
        assert llm.plan == NOTHING
    llm.apply(Plan())
    assert torch.equal(logits(llm), logits(whole))


@each_family("family")
def test_gradients_pass_through_weights_that_were_read(tmp_path, family) -> None:
    folder, results = saved(tmp_path / "m", family), []
    for llm in (load_llm(folder, device="cpu", dtype="float32"), loaded(folder)):
        forward = PartialForward(llm, gradients=True)
        entered = output = forward.enter(IDS).detach().requires_grad_()
        with layer(llm, 1):
            for step in forward.layer_steps[1]:
                output = forward.run(step, output)
            results.append(torch.autograd.grad(output.square().sum(), entered)[0])
            assert not any(p.requires_grad or p.is_inference() for p in llm.model.parameters())
    assert torch.equal(*results)
    assert results[0].abs().max() > 0


def test_a_block_reads_only_itself(tmp_path) -> None:
    llm = loaded(saved(tmp_path / "m"))
    forward, base = PartialForward(llm), rest_bytes(llm)
    state = forward.enter(IDS)
    with llm.applied(Plan.removing(0, 2, 3)):
        assert llm.held_bytes.weights == base + llm.facts.block_param_bytes[1]
        for _ in range(2):
            forward.run((1,), state, Plan(weights=((1, "int4"),)))
            assert llm.held_bytes.weights == base + llm.facts.block_param_bytes[1]
    with forward.embeddings("int8"):
        assert llm.plan == Plan(NOTHING.removed, embeddings="int8")


@each_family("family", save=SAVE)
def test_levels_of_embeddings_and_other_residencies(tmp_path, family, save) -> None:
    folder = save(tmp_path / "m", family)
    whole = load_llm(folder, device="cpu", dtype="float32")
    llm = loaded(folder)
    if save is saved and family in MIXTURES:
        assert llm.residency == "resident"
        return
    facts = whole.facts
    for level in facts.embedding_levels:
        results = []
        for model in (llm, whole):
            forward = PartialForward(model)
            state = forward.enter(IDS, level)
            with forward.embeddings(level):
                results += [state, forward.logits(forward.leave(state)[0])]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
        assert llm.held_bytes.weights == rest_bytes(llm)
    for residency in ("resident", "drop", "resident"):
        llm.set_residency(residency)
        with llm.applied(Plan()):
            assert torch.equal(logits(llm), logits(whole))
            assert llm.held_bytes.weights == facts.base_bytes + sum(facts.block_param_bytes)


def test_files_in_parts_and_those_of_other_layouts_are_read(tmp_path, caplog) -> None:
    for family in ("llama_tied", "mixtral"):
        tiny_model(family).save_pretrained(tmp_path / family, max_shard_size=4096)
        tiny_tokenizer().save_pretrained(tmp_path / family)
        llm, whole = (loaded(tmp_path / family, on_demand=read) for read in (True, False))
        assert torch.equal(layer_by_layer(llm), layer_by_layer(whole))
        assert llm.plan == (NOTHING if family == "llama_tied" else Plan())
    assert [record.message for record in caplog.records if "loaded whole" in record.message] == [
        "mixtral is loaded whole, because its files have other tensors"
    ]


def test_damaged_files(tmp_path) -> None:
    folder = saved(tmp_path / "m")
    llm, weights = loaded(folder), folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ChecksumError, match="other content than when the model was opened"):
        llm.apply(Plan())
    assert llm.plan == NOTHING
    weights.write_bytes(content[:-10])
    with pytest.raises(ChecksumError, match="truncated or damaged"):
        loaded(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [('"num_hidden_layers": 3', "lacks .* tensors"), ('"intermediate_size": 32', "do not fit")],
)
def test_files_that_do_not_fit_the_config(tmp_path, change, words) -> None:
    config = saved(tmp_path / "m") / "config.json"
    config.write_text(config.read_text().rstrip()[:-1] + f", {change}}}")
    with pytest.raises(UnsupportedModelError, match=words):
        loaded(tmp_path / "m")


def test_a_pruned_checkpoint_is_loaded_whole(tmp_path, caplog) -> None:
    save_pruned(tiny_llm(tokenizer=tiny_tokenizer()), Plan.removing(0), tmp_path / "pruned")
    assert loaded(tmp_path / "pruned", dtype="auto").residency == "resident"
    assert "is loaded whole, because it is a pruned checkpoint" in caplog.text
