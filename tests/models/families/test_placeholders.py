"""A stub is the map that its docstring states, in any rank and dtype."""

import pytest
import torch

from rap_env.models.families.placeholders import Stub, normalised
from tests.models.stubs import RANKS, random_stubs
from tests.tiny import tiny_llm

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", RANKS)
def test_it_adds_a_low_rank_map_of_the_normalised_state_and_a_mean(rank: int) -> None:
    stub = random_stubs(tiny_llm(), (rank,))[0]
    x = X.double()
    normed = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    expected = normed @ stub.down.double().T @ stub.up.double().T + stub.mean.double()
    assert stub(X).shape == X.shape
    torch.testing.assert_close(stub(X), expected.float())
    assert stub.rank == rank
    assert stub.nbytes == 4 * 16 * (2 * rank + 1)


def test_the_length_of_a_state_does_not_matter() -> None:
    torch.testing.assert_close(normalised(1000 * X), normalised(X))
    lengths = normalised(X).square().mean(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(3, 5))


def test_states_whose_squares_overflow_half_precision() -> None:
    normed = normalised((1000 * X).half())
    assert normed.dtype == torch.float16
    torch.testing.assert_close(normed.float(), normalised(X), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", RANKS)
def test_it_answers_in_the_dtype_of_the_states(rank: int) -> None:
    stub = random_stubs(tiny_llm(), (rank,))[0]
    answer = stub(X.bfloat16())
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), stub(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rank", RANKS)
def test_zeros_add_nothing_and_can_be_filled(rank: int) -> None:
    stub = Stub.zeros(rank, 16, torch.float32)
    assert torch.equal(stub(X), torch.zeros_like(X))
    # Each part has its own memory: filling one does not change the others.
    other = random_stubs(tiny_llm(), (rank,))[0]
    stub.load_state_dict(other.state_dict())
    for ours, theirs in zip(stub.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(stub(X), other(X))


def test_a_stub_on_a_device_is_a_copy() -> None:
    stub = random_stubs(tiny_llm())[0]
    copy = stub.on(torch.device("cpu"))
    with torch.no_grad():
        copy.down.zero_()
    assert stub.down.abs().min() > 0
    assert not any(parameter.requires_grad for parameter in copy.parameters())
