"""Masks to train under: they fit, come from the seed alone, and follow the price without noise."""

from collections import Counter

import numpy as np
import pytest

from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.plan import Plan
from rap_env.repair.distilling import NOISE, MaskSampler
from rap_env.workload.sampler import FixedSampler, GridSampler

LAYERS = 4
LOSSES = np.array([0.3, 0.2, 0.05, 0.4, 0.1, 0.02, 0.6, -0.01])


def memory(stub_bytes: int = 0) -> MemoryModel:
    return MemoryModel(
        ModelFacts(
            name="made-up",
            fingerprint="f" * 64,
            dtype="bfloat16",
            block_param_bytes=(1000, 3000) * LAYERS,
            base_bytes=3000,
            kv_bytes_per_token=(8,) * LAYERS,
            kv_window_tokens=(None,) * LAYERS,
            itemsize=2,
            hidden_size=1,
            ffn_width=1,
            vocab_size=10,
            max_positions=2048,
            stub_bytes=(stub_bytes,) * 2 * LAYERS if stub_bytes else (),
            repair="r" * 64 if stub_bytes else "",
        )
    )


def grid(model: MemoryModel) -> GridSampler:
    return GridSampler(model, (1, 4), (16, 256, 2048), (0.6, 0.75, 0.9))


def masks(draw: MaskSampler, count: int, seed: int = 0) -> list[Plan]:
    rng = np.random.default_rng(seed)
    return [draw.draw(rng) for _ in range(count)]


STUBS = pytest.mark.parametrize("stub_bytes", [0, 200])


@STUBS
def test_a_mask_fits_its_budget_and_is_minimal_in_its_order(stub_bytes: int) -> None:
    model = memory(stub_bytes)
    for request in grid(model).requests:
        sampler = FixedSampler(
            model, request.batch_size, request.seq_len_tokens, budget_bytes=request.budget_bytes
        )
        for mask in set(masks(MaskSampler(model, sampler, LOSSES), 50)):
            assert model.peak_bytes(mask, request) <= request.budget_bytes, mask
            # Whichever was removed last, the mask without it does not fit.
            peaks = [
                model.peak_bytes(Plan(mask.removed - {b}), request) for b in sorted(mask.removed)
            ]
            assert max(peaks) > request.budget_bytes


@STUBS
def test_the_seed_determines_the_masks(stub_bytes: int) -> None:
    model = memory(stub_bytes)
    draw = MaskSampler(model, grid(model), LOSSES)
    assert masks(draw, 20) == masks(draw, 20) == masks(MaskSampler(model, grid(model), LOSSES), 20)
    assert masks(draw, 20) != masks(draw, 20, seed=1)
    assert len(set(masks(draw, 50))) > 20


def by_price(model: MemoryModel, request, losses) -> Plan:
    """What removes the cheapest blocks one by one until the request fits."""
    price = np.maximum(losses, 1e-3) / model.freed_bytes(request)
    order = [int(index) for index in np.argsort(price, kind="stable")]
    for count in range(len(order) + 1):
        mask = Plan.removing(*order[:count])
        if model.peak_bytes(mask, request) <= request.budget_bytes:
            return mask
    raise AssertionError


@STUBS
def test_without_noise_the_order_follows_the_cost_per_byte(stub_bytes: int) -> None:
    model = memory(stub_bytes)
    sampler = grid(model)
    draw = MaskSampler(model, sampler, LOSSES, noise=(0.0,))
    expected = {by_price(model, request, LOSSES) for request in sampler.requests}
    assert set(masks(draw, 200)) == expected
    assert len(expected) > 5


def test_short_requests_lose_ffn_blocks_and_long_ones_attention() -> None:
    model = memory()
    removed = []
    for tokens in (16, 2048):
        sampler = FixedSampler(model, 4, tokens, budget_fraction=0.7)
        found = masks(MaskSampler(model, sampler, np.ones(2 * LAYERS)), 200)
        removed.append([sum(m.count_removed(kind) for m in found) for kind in ("attn", "ffn")])
    (short_attn, short_ffn), (long_attn, long_ffn) = removed
    assert short_ffn > 1.5 * short_attn
    assert long_attn > 1.5 * long_ffn


def test_more_noise_gives_more_distinct_masks() -> None:
    model = memory()
    sampler = FixedSampler(model, 1, 16, budget_fraction=0.8)
    seen = []
    for noise in NOISE:
        counts = Counter(masks(MaskSampler(model, sampler, LOSSES, noise=(noise,)), 300))
        seen.append(len(counts))
    assert seen[0] == 1
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("budget_bytes", "mask"), [(10**9, Plan()), (1, Plan.removing(*range(2 * LAYERS)))]
)
def test_budgets_that_every_mask_or_none_meets(budget_bytes: int, mask: Plan) -> None:
    model = memory()
    sampler = FixedSampler(model, 1, 16, budget_bytes=budget_bytes)
    assert set(masks(MaskSampler(model, sampler, LOSSES), 20)) == {mask}
