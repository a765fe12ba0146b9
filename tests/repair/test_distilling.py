"""Distilled stubs: training, and the divergence that it lowers."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.harness import measured_peak
from rap_env.errors import ArtifactError, InvalidRequestError, UnsupportedModelError
from rap_env.memory import MemoryModel
from rap_env.models.files.streamed import stream_llm
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.repair.config import DistillConfig, FitConfig
from rap_env.repair.distilling import MaskSampler, distill, divergence
from rap_env.repair.fitting import fit_library
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.nll import HEAD_TOKENS
from rap_env.workload.sampler import FixedSampler, GridSampler, RequestSampler
from tests.models.states import saved, weights_hash
from tests.models.stubs import random_stubs
from tests.repair.texts import divergence_of, random_text
from tests.tiny import FAMILIES, VOCAB_SIZE, each_family, tiny_llm

LAYERS = 3
TEXT, HELD_BACK = random_text(0, 20), random_text(1, 10)
MASKS = [Plan.removing(0, 3), Plan.removing(1, 2, 5), Plan.removing(0, 1, 4)]
SHORT = DistillConfig(steps=12, windows=3, learning_rate=1e-2, warmup_steps=3)


def tiny(name: str = "llama", **how):
    return tiny_llm(name, layers=LAYERS, **how)


def fitted(llm) -> StubLibrary:
    config = FitConfig(rank=2, ranks=(0, 1, 2, 4))
    return fit_library(llm, TEXT, HELD_BACK, config, progress=False)


def draw(llm, requests: RequestSampler | None = None, **settings) -> MaskSampler:
    memory = MemoryModel(llm)
    sampler = requests or GridSampler(memory, (1, 8), (4, 60), (0.6, 0.8))
    return MaskSampler(memory, sampler, np.linspace(0.1, 0.6, 2 * LAYERS), **settings)


def distilled(llm, library, config=SHORT, *, masks=None) -> StubLibrary:
    return distill(llm, library, TEXT, masks or draw(llm), config, progress=False)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt_neox", "gemma2"))]
)
def test_distillation_reduces_the_divergence_from_the_dense_model(name: str) -> None:
    llm = tiny(name)
    library = fitted(llm)
    config = DistillConfig(steps=150, windows=10, learning_rate=1e-2, warmup_steps=10)
    learnt = distilled(llm, library, config)
    before, after = (
        [divergence_of(lib.attach(llm), TEXT, mask) for mask in MASKS] for lib in (library, learnt)
    )
    assert sum(after) < 0.9 * sum(before)
    steps = learnt.provenance["divergences"]
    assert len(steps) == 3  # a mean for each 50 updates
    assert steps[-1] < steps[0]
    assert learnt.ranks == library.ranks


@each_family("name", wants_gradients=[True, False])
def test_only_stubs_change(name: str, wants_gradients: bool) -> None:
    llm = tiny(name)
    llm.model.requires_grad_(wants_gradients)
    library, weights = fitted(llm), weights_hash(llm.model)
    start = {index: stub.mean.clone() for index, stub in library.stubs.items()}
    learnt = distilled(llm, library, DistillConfig(steps=3, windows=2))
    assert weights_hash(llm.model) == weights
    parameters = list(llm.model.parameters())
    assert all(parameter.grad is None for parameter in parameters)
    assert {parameter.requires_grad for parameter in parameters} == {wants_gradients}
    assert llm.mask == Plan()
    assert llm.facts.repair == ""
    for index, stub in library.stubs.items():
        assert torch.equal(stub.mean, start[index])  # the library that was given is left alone
        assert not any(part.requires_grad for part in learnt.stubs[index].parameters())
    assert learnt.sha256 != library.sha256


@pytest.mark.parametrize("budget_bytes", [1, 10**9])
def test_stubs_of_removed_blocks_are_trained_and_no_others(budget_bytes: int) -> None:
    llm = tiny()
    llm.model.requires_grad_(False)  # as load_llm() gives it
    library = fitted(llm)
    masks = draw(llm, FixedSampler(MemoryModel(llm), 1, 8, budget_bytes=budget_bytes))
    learnt = distilled(llm, library, masks=masks)
    if budget_bytes > 1:  # nothing is removed
        assert learnt.sha256 == library.sha256
        assert learnt.provenance["divergences"] == pytest.approx([0], abs=1e-5)
        return
    for index, stub in library.stubs.items():
        assert not torch.equal(learnt.stubs[index].mean, stub.mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_in_the_models_dtype_and_belongs_to_it(dtype, tmp_path) -> None:
    llm = tiny(dtype=dtype)
    learnt = distilled(llm, fitted(llm))
    assert all(stub.down.dtype == dtype for stub in learnt.stubs.values())
    learnt.save(tmp_path / "stubs.safetensors")
    loaded = StubLibrary.load(tmp_path / "stubs.safetensors")
    assert loaded.sha256 == learnt.sha256
    assert loaded.attach(llm).facts.repair == learnt.sha256
    known = loaded.provenance
    assert known["run"]["settings"]["steps"] == 12
    assert known["run"]["started_from"] == fitted(llm).sha256
    assert known["text"]["sha256"] == TEXT.sha256
    assert known["library"]["held_back"]["sha256"] == HELD_BACK.sha256


def test_the_seed_determines_the_result() -> None:
    llm = tiny()
    library = fitted(llm)
    first = distilled(llm, library)
    assert distilled(llm, library).sha256 == first.sha256
    assert distilled(tiny(), library).sha256 == first.sha256
    other = DistillConfig(**{**vars(SHORT), "seed": 1})
    assert distilled(llm, library, other).sha256 != first.sha256


def test_the_mask_in_force_does_not_matter_and_stays() -> None:
    llm = tiny()
    library = fitted(llm)
    expected = distilled(llm, library).sha256
    with library.attach(llm).masked(MASKS[0]) as view:
        inside = divergence_of(view, TEXT, MASKS[0])
        assert distilled(llm, library).sha256 == expected
        assert llm.mask == MASKS[0]
        assert divergence_of(view, TEXT, MASKS[0]) == inside


# Refusals


def test_a_streamed_model_is_rejected(lonely, tmp_path) -> None:
    folder = saved(tmp_path / "m", "llama", torch.float32)
    llm = stream_llm(folder, device="cpu", dtype="float32", max_memory_bytes=2**20)
    library = StubLibrary(llm.name, llm.fingerprint, random_stubs(llm))
    masks = MaskSampler(MemoryModel(llm), FixedSampler(MemoryModel(llm)), np.ones(llm.num_blocks))
    with pytest.raises(UnsupportedModelError, match=r"is streamed .*load it with load_llm\(\)"):
        distilled(llm, library, masks=masks)


def test_stubs_of_another_model_are_rejected() -> None:
    with pytest.raises(ArtifactError, match="were fitted on tiny-llama with other weights"):
        distilled(tiny(seed=1), fitted(tiny()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps of a distillation must be at least 1, not 0"),
        ({"windows": 0}, "windows"),
        ({"warmup_steps": -1}, "warmup_steps of a distillation must be at least 0"),
        ({"learning_rate": 0.0}, "must be above 0, not 0.0"),
        ({"learning_rate": float("nan")}, "must be above 0, not nan"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        DistillConfig(**settings)


def test_the_rate_rises_then_falls_along_half_a_cosine() -> None:
    config = DistillConfig(steps=100, learning_rate=2.0, warmup_steps=10)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert int(np.argmax(rates)) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[50] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert 0.1 <= rates[-1] < 0.11


def test_every_window_is_used_once_per_epoch() -> None:
    from rap_env.repair.distilling import Trainer

    llm = tiny()
    config = DistillConfig(steps=20, windows=3)
    trainer = Trainer(llm, fitted(llm), TEXT, draw(llm), config)
    seen = torch.cat([trainer._windows(step) for step in range(20)]).tolist()
    epochs = [seen[:20], seen[20:40], seen[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def states(llm, rows: int, seed: int) -> torch.Tensor:
    partial = PartialForward(llm)
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, partial.head.in_features, generator=generator).to(llm.dtype)


def by_torch(partial, student, teacher) -> tuple[float, torch.Tensor]:
    student = student.clone().requires_grad_()
    log_q = partial.head_logits(student).float().log_softmax(dim=-1)
    log_p = partial.head_logits(teacher).float().log_softmax(dim=-1).detach()
    value = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (slope,) = torch.autograd.grad(value, student)
    return value.item(), slope


def check_divergence(llm, rows: int, scale: float = 1.0) -> float:
    """Compare value and gradient with those of torch; gives the value."""
    partial = PartialForward(llm)
    student, teacher = scale * states(llm, rows, 0), scale * states(llm, rows, 1)
    expected, slope = by_torch(partial, student, teacher)
    value, gradient = divergence(partial, student, teacher)
    assert all(parameter.grad is None for parameter in llm.model.parameters())
    assert not any(tensor.requires_grad for tensor in (student, teacher))
    assert value == pytest.approx(expected, rel=1e-5)  # in bfloat16 from the same rounded logits
    assert gradient.dtype == llm.dtype
    if llm.dtype == torch.bfloat16:
        assert (gradient - slope).norm() <= 0.02 * slope.norm()
    else:
        torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6 if scale == 1 else 1e-7)
    return value


@pytest.mark.parametrize("rows", [1, 7, HEAD_TOKENS, HEAD_TOKENS + 37])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_divergence_and_gradient_equal_torch(family: str, rows: int) -> None:
    assert check_divergence(tiny_llm(family), rows) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_supports_the_head_of_every_family(family: str) -> None:
    check_divergence(tiny_llm(family), 20)


def test_in_bfloat16_up_to_its_rounding() -> None:
    check_divergence(tiny_llm(dtype=torch.bfloat16), 50)


def test_the_soft_cap_of_gemma_is_in_both() -> None:
    llm = tiny_llm("gemma2")
    # So far out that the cap bends every large logit.
    assert llm.adapter.config.final_logit_softcapping == 30
    assert PartialForward(llm).head(30 * states(llm, 50, 0)).abs().max() > 60
    capped = check_divergence(llm, 50, scale=30)
    llm.adapter.config.final_logit_softcapping = None
    assert check_divergence(llm, 50, scale=30) > 1.5 * capped


def test_logits_of_a_few_tokens_exist_at_a_time() -> None:
    llm = tiny_llm()
    partial, rows = PartialForward(llm), 32 * HEAD_TOKENS
    student, teacher = states(llm, rows, 0), states(llm, rows, 1)
    with measured_peak(llm.device) as measured:
        divergence(partial, student, teacher)
    assert measured.peak_bytes < rows * VOCAB_SIZE * 4  # all logits of one of both
