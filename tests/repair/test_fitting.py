"""Fitted libraries: right, bounded, and the same from a streamed model."""

import json

import pytest
import torch
from torch import nn

from rap_env.errors import CorpusError, InvalidRequestError
from rap_env.models.files.loading import load_llm
from rap_env.models.files.streamed import stream_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.repair import fitting
from rap_env.repair.fitting import fit_library
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.corpus import Corpus
from tests.models.live.test_elastic import MASKS
from tests.models.states import logits, saved, weights_hash
from tests.repair.texts import random_text, state_error
from tests.tiny import each_family, tiny_llm, tiny_model

TEXT, HELD_BACK = random_text(0, 60), random_text(1, 20)
RANK = 4


@pytest.fixture(autouse=True)
def small_ranks(monkeypatch):
    """Ranks and penalties that suit a width of 16."""
    monkeypatch.setattr(fitting, "RANKS", (0, 1, 2, 4, 8, 16))


def fitted(llm: ElasticLLM, rank: int = RANK) -> StubLibrary:
    return fit_library(llm, TEXT, HELD_BACK, rank, progress=False)


@each_family("name", dtype=[torch.float32, torch.bfloat16])
def test_every_block_has_a_stub_that_helps(name: str, dtype) -> None:
    llm = tiny_llm(name, dtype=dtype)
    weights = weights_hash(llm.model)
    library = fitted(llm)
    assert sorted(library.stubs) == list(range(llm.num_blocks))
    assert (library.model, library.fingerprint) == (llm.name, llm.fingerprint)
    assert sum(library.ranks.values()) <= RANK * llm.num_blocks
    assert library.nbytes <= llm.num_blocks * 16 * (2 * RANK + 1) * dtype.itemsize
    assert all(stub.mean.dtype == dtype for stub in library.stubs.values())
    assert all(0 <= error < 1 for error in library.provenance["held_back_errors"])
    assert weights_hash(llm.model) == weights
    assert library.attach(llm).facts.stub_bytes == tuple(
        library.stubs[index].nbytes for index in range(llm.num_blocks)
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt_neox_sequential", "opt"])
def test_a_stub_reduces_the_state_error_on_held_out_text(name: str) -> None:
    llm = tiny_llm(name)
    view = fitted(llm).attach(llm)
    for block in range(llm.num_blocks):
        mask = Plan.removing(block)
        assert state_error(view, HELD_BACK, mask) < state_error(llm, HELD_BACK, mask), block


def test_the_held_out_error_is_the_remaining_residual() -> None:
    llm = tiny_llm()
    library = fitted(llm)
    view = library.attach(llm)
    # The last block's output enters the stream unchanged, so its error shows in the last state.
    entering: list[torch.Tensor] = []
    norm = llm.adapter.decoder(llm.model).norm
    norm.register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    with torch.no_grad():
        for masked in (llm.masked(Plan()), llm.masked(Plan.removing(3))):
            with masked:
                llm.hidden(HELD_BACK.tokens)
        with view.masked(Plan.removing(3)):
            llm.hidden(HELD_BACK.tokens)
    dense, without, with_stub = entering
    share = (dense - with_stub).square().mean() / (dense - without).square().mean()
    assert library.provenance["held_back_errors"][3] == pytest.approx(float(share), rel=1e-3)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_that_is_linear_is_reproduced(parallel: bool, monkeypatch) -> None:
    """With a parallel residual the feed-forward block does not see what attention added."""
    model = tiny_model("gpt_neox" if parallel else "llama")
    layer = model.base_model.layers[0]
    if parallel:
        layer.post_attention_layernorm = nn.RMSNorm(16, eps=1e-6)
    layer.mlp = nn.Linear(16, 16)  # the norm in front has a weight, which is linear too
    llm = ElasticLLM(model, None, name="linear")
    monkeypatch.setattr(fitting, "RIDGES", (1e-9,))
    library = fitted(llm, 16)
    view, mask = library.attach(llm), Plan.removing(1)
    assert library.provenance["held_back_errors"][1] < 1e-6
    dense = logits(llm)
    with view.masked(mask):
        torch.testing.assert_close(logits(llm), dense, rtol=1e-3, atol=1e-3)
    with llm.masked(mask):
        assert (logits(llm) - dense).abs().max() > 0.1


def test_ranks_are_given_to_the_largest_savings(monkeypatch) -> None:
    llm = tiny_llm(layers=3)
    monkeypatch.setattr(fitting, "RANKS", tuple(range(17)))
    uneven = fitted(llm)
    monkeypatch.setattr(fitting, "RANKS", (RANK,))
    even = fitted(llm)
    assert len(set(uneven.ranks.values())) > 1
    assert sum(uneven.provenance["held_back_errors"]) < sum(even.provenance["held_back_errors"])
    assert uneven.nbytes <= even.nbytes


def test_the_best_ridge_on_held_out_text_is_selected(monkeypatch) -> None:
    llm = tiny_llm()
    ridges = (1e-6, 0.1, 1e4)
    monkeypatch.setattr(fitting, "RANKS", (RANK,))
    errors = []
    for ridge in ridges:
        monkeypatch.setattr(fitting, "RIDGES", (ridge,))
        errors.append(fitted(llm).provenance["held_back_errors"])
    monkeypatch.setattr(fitting, "RIDGES", ridges)
    library = fitted(llm)
    for block, (ridge, error) in enumerate(
        zip(library.provenance["ridge"], library.provenance["held_back_errors"], strict=True)
    ):
        choices = [of_ridge[block] for of_ridge in errors]
        assert error == min(choices)
        assert ridge == ridges[choices.index(error)]


def test_a_rank_above_the_width_is_the_width() -> None:
    library = fitted(tiny_llm(), 64)
    assert set(library.ranks.values()) <= {0, 1, 2, 4, 8, 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_a_streamed_model_gives_the_same_stubs(name: str, dtype: str, lonely, tmp_path) -> None:
    folder = saved(tmp_path / "m", name, torch.float32)
    whole = fitted(load_llm(folder, device="cpu", dtype=dtype))
    streamed = stream_llm(folder, device="cpu", dtype=dtype, max_memory_bytes=2**20)
    assert fitted(streamed).sha256 == whole.sha256


def test_the_mask_in_force_does_not_matter_and_stays() -> None:
    llm = tiny_llm()
    expected = fitted(llm).sha256
    with llm.masked(MASKS["everything"]):
        assert fitted(llm).sha256 == expected
        assert llm.plan.mask == MASKS["everything"]
    view = fitted(llm).attach(llm)
    assert fitted(view).sha256 == expected  # the dense model is fitted, whatever its view does


def test_provenance_describes_the_fit(tmp_path) -> None:
    library = fitted(tiny_llm())
    library.save(tmp_path / "stubs.safetensors")
    known = StubLibrary.load(tmp_path / "stubs.safetensors").provenance
    assert known["text"]["sha256"] == TEXT.sha256
    assert known["held_back"]["sha256"] == HELD_BACK.sha256
    assert known["rank"] == RANK
    assert len(known["ridge"]) == len(known["held_back_errors"]) == 4
    assert json.dumps(known)


def test_a_rank_below_zero_is_rejected() -> None:
    with pytest.raises(InvalidRequestError, match="must be 0 or above, not -1"):
        fitted(tiny_llm(), -1)


def test_overlapping_texts_are_rejected() -> None:
    shared = Corpus.of_tokens(torch.cat([HELD_BACK.tokens, TEXT.tokens[-1:]]))
    with pytest.raises(CorpusError, match="share 12 tokens in a row"):
        fit_library(tiny_llm(), TEXT, shared, progress=False)
