"""Attention over stored groups against a plain computation, one token at a time."""

import pytest
import torch

from rap_env.levels import GROUP_TOKENS, CacheLevel, channel_groups
from rap_env.models.caches import grouped_attention
from rap_env.models.caches.grouped_attention import attend
from rap_env.models.caches.grouped_cache import GroupedLayer
from rap_env.models.caches.groups import pack, parts, widen

LEVELS = ["int8", "int4", "int2", "window32", "window64", "int4-window64"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(bits: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Groups as they are read after they were stored."""
    return widen(bits, pack(bits, keys, values), keys.dtype)


def plain(query, keys, values, level, scale, softcap=None, window=None) -> torch.Tensor:
    """One row's attention by the definition: (N, T, D), (K, T, D) twice -> (T, N, D), float64.

    A token sees the keys and values of its own group as they are, those of earlier groups as the
    level stores them.
    """
    heads, tokens, _ = keys.shape
    count = tokens // GROUP_TOKENS
    done = count * GROUP_TOKENS
    stored = [t.double().clone() for t in (keys, values)]
    groups = (t[:, :done].unflatten(1, (count, GROUP_TOKENS)) for t in (keys, values))
    for whole, part in zip(stored, rounded(level.bits, *groups), strict=True):
        whole[:, :done] = part.flatten(1, 2).double()
    group = torch.arange(tokens) // GROUP_TOKENS
    own = group[:, None] == group
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = torch.tensor([[level.sees(a, b) for b in range(count + 1)] for a in range(count + 1)])
    seen = (own | visible[group][:, group]) & (back >= 0)
    if window is not None:
        seen &= back < window
    repeats = query.shape[0] // heads
    exact = [t.double().repeat_interleave(repeats, 0) for t in (keys, values)]
    lower = [t.repeat_interleave(repeats, 0) for t in stored]
    near, far = (query.double() @ t[0].mT * scale for t in (exact, lower))
    scores = torch.where(own, near, far)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    actual = (weights * own) @ exact[1] + (weights * ~own) @ lower[1]
    return actual.transpose(0, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("softcap", "window", "size"),
    [
        (2.0, None, 8),
        (None, 45, 64),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((None, None, 8), (5.0, 70, 33))),
    ],
)
def test_every_way_through_equals_the_definition(level, softcap, window, size) -> None:
    level, tokens, scale = CacheLevel.of(level), 150, 0.3
    query, keys, values = (random(2, n, tokens, size, seed=n) for n in (4, 2, 2))
    values = values + 1  # not symmetric
    expected = torch.stack(
        [plain(query[b], keys[b], values[b], level, scale, softcap, window) for b in range(2)]
    )

    def close(actual: torch.Tensor, start: int) -> None:
        stop = start + actual.shape[1]
        torch.testing.assert_close(actual.double(), expected[:, start:stop], rtol=1e-4, atol=2e-5)

    for sizes in ([tokens], [100, 50], [7] * 20 + [10], [33, 31, 1, 1, 1, 64, 19], [1] * tokens):
        layer, start = GroupedLayer(level, window), 0
        for count in sizes:
            part = slice(start, start + count)
            chunk, _ = layer.update(keys[:, :, part], values[:, :, part])
            close(attend(query[:, :, part], chunk, scale, softcap, window), start)
            start += count
        assert layer.get_seq_length() == tokens


def test_small_pieces_give_the_same(monkeypatch) -> None:
    level = CacheLevel.of("int4")
    query, keys, values = (random(2, n, 200, 16, seed=n) for n in (4, 2, 2))

    def both() -> list[torch.Tensor]:
        layer = GroupedLayer(level)
        layer.update(keys[:, :, :150], values[:, :, :150])
        chunk, _ = layer.update(keys[:, :, 150:199], values[:, :, 150:199])
        several = attend(query[:, :, 150:199], chunk, None)
        chunk, _ = layer.update(keys[:, :, 199:], values[:, :, 199:])
        return [several, attend(query[:, :, 199:], chunk, None)]

    whole = both()
    monkeypatch.setattr(grouped_attention, "PIECE_VALUES", 2 * 2 * GROUP_TOKENS * 16 * 2)
    monkeypatch.setattr(grouped_attention, "_UNPACKED_BYTES", 5 * 2 * 2 * GROUP_TOKENS * 16 * 2)
    for actual, expected in zip(both(), whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_numbers_of_half_precision_stay_close() -> None:
    """bfloat16 rounds widened keys and values to 8 bits: 2 % of outputs of about 1."""
    level = CacheLevel.of("int4")
    query, keys, values = (random(1, n, 100, 64, seed=n).bfloat16() for n in (4, 2, 2))
    expected = plain(query[0], keys[0], values[0], level, 0.125)
    actual = attend(query, GroupedLayer(level).update(keys, values)[0], 0.125)[0]
    layer = GroupedLayer(level)
    layer.update(keys[:, :, :99], values[:, :, :99])
    chunk, _ = layer.update(keys[:, :, 99:], values[:, :, 99:])
    single = attend(query[:, :, 99:], chunk, 0.125)[0]
    assert actual.dtype == single.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(single.double(), expected[99:], rtol=0, atol=0.02)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("size", [5, 64, 96])
def test_a_stored_value_is_off_by_half_a_code(bits, size) -> None:
    keys, values = random(2, 3, 4, 32, size) * 3 + 2, random(2, 3, 4, 32, size, seed=1) - 1
    groups = pack(bits, keys, values)
    assert sum(t.nbytes for t in groups) == 2 * 4 * CacheLevel(bits).group_bytes(3, size, 4)
    actual = widen(bits, groups, torch.float32)
    key_part, value_part = parts(groups)
    scale = value_part.scale.float().transpose(-1, -2)
    scale = scale.repeat_interleave(size // channel_groups(size), -1)
    # Scales have 8 bits, so the outermost value may lie beyond the last code: by 2 ** -8 of the
    # range of the codes; zeros are rounded to 8 bits as well.
    most = 127 if bits == 8 else 2**bits - 1
    for mine, exact, step in zip(
        actual, (keys, values), (key_part.scale.float(), scale), strict=True
    ):
        off = (mine - exact).abs()
        assert (off <= step * (0.5 + most / 256) + exact.abs().amax() / 256).all()
        assert (off <= 0.51 * step).float().mean() > 0.97


def test_keys_are_quantised_per_channel_and_values_per_token() -> None:
    """A channel of large keys, and a token of large values, cost the others nothing."""
    keys, values = random(1, 1, 1, 32, 64), random(1, 1, 1, 32, 64, seed=1)
    small = [(a - b).abs() for a, b in zip(rounded(4, keys, values), (keys, values), strict=True)]
    keys[..., 7] *= 100
    values[..., 9, :] *= 100
    large = [(a - b).abs() for a, b in zip(rounded(4, keys, values), (keys, values), strict=True)]
    others = [n for n in range(64) if n != 7]
    assert torch.equal(large[0][..., others], small[0][..., others])
    rest = [n for n in range(32) if n != 9]
    assert torch.equal(large[1][..., rest, :], small[1][..., rest, :])


def test_equal_values_are_exact_and_zero_is_zero() -> None:
    for bits in (8, 4, 2):
        zeros = torch.zeros(1, 1, 1, 32, 4)
        keys, values = rounded(bits, zeros, zeros)
        assert torch.equal(keys, zeros)
        assert torch.equal(values, zeros)
    same = torch.full((1, 1, 1, 32, 4), 0.75)
    assert torch.equal(rounded(4, same, same)[0], same)
