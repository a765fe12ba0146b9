"""Samplers around others: requests that repeat, and budgets that are eased at first."""

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.workload import make_sampler
from tests.workload.drawing import draws, share

LOW = {"name": "fixed", "batch_size": 2, "seq_len_tokens": 100, "budget_fraction": 0.3}
GRID = {"name": "grid", "batch_sizes": [1, 2], "budget_fractions": [0.55, 0.7]}


class TestPool:
    def test_the_pool_depends_on_its_own_seed_alone(self, memory):
        spec = {"name": "pool", "of": {"name": "azure-conv", "max_batch_size": 4}, "size": 20}
        pools = [make_sampler({**spec, "seed": seed}, memory).requests for seed in (3, 3, 4)]
        assert pools[0] == pools[1] != pools[2]
        assert max(request.batch_size for request in pools[0]) <= 4
        sampler = make_sampler({**spec, "seed": 3}, memory)
        draws(sampler, 9, seed=1)
        assert sampler.clone().requests == sampler.requests == pools[0]


class TestCurriculum:
    def test_the_curriculum_bound_decreases_to_zero(self, memory):
        spec = {"name": "curriculum", "of": LOW, "requests": 4, "start_fraction": 0.8}
        shares = [share(memory, request) for request in draws(make_sampler(spec, memory), 6)]
        assert shares == pytest.approx([0.8, 0.6, 0.4, 0.3, 0.3, 0.3], abs=1e-3)

    def test_only_budgets_are_eased(self, memory):
        spec = {"name": "curriculum", "of": GRID, "requests": 30}
        eased = draws(make_sampler(spec, memory), 60)
        plain = draws(make_sampler(GRID, memory), 60)
        shapes = [
            [(request.batch_size, request.seq_len_tokens) for request in found]
            for found in (eased, plain)
        ]
        assert shapes[0] == shapes[1]
        assert eased[30:] == plain[30:]
        raised = [a.budget_bytes - b.budget_bytes for a, b in zip(eased, plain, strict=True)]
        assert min(raised) == 0
        assert all(gained > 0 for gained in raised[:6])

    def test_a_curriculum_restarts_at_a_position_with_its_inner_sampler(self, memory, trace):
        inner = {"name": "trace", "path": str(trace), "order": "replay"}
        spec = {"name": "curriculum", "of": inner, "requests": 8}
        whole = make_sampler(spec, memory)
        rng = np.random.default_rng(5)
        first = [whole.sample(rng) for _ in range(3)]
        assert whole.position == 3
        state = rng.bit_generator.state
        rest = [whole.sample(rng) for _ in range(6)]
        resumed = make_sampler(spec, memory)
        resumed.restart(3)
        rng.bit_generator.state = state
        assert [resumed.sample(rng) for _ in range(6)] == rest
        whole.restart()
        assert draws(whole, 3, seed=5) == first

    def test_clones_have_their_own_position(self, memory, trace):
        inner = {"name": "trace", "path": str(trace), "order": "replay"}
        sampler = make_sampler({"name": "curriculum", "of": inner, "requests": 8}, memory)
        before = draws(sampler, 4)
        clone = sampler.clone()
        assert (sampler.position, clone.position) == (4, 0)
        assert draws(clone, 4) == before
        assert sampler.position == 4
        assert draws(sampler, 1)[0].seq_len_tokens == 505  # the fifth of the file


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"name": "pool", "of": "azure"}, UnknownNameError, "sampler 'azure'"),
        (
            {"name": "pool", "size": 0},
            InvalidRequestError,
            "size must be .* at least 1, not 0",
        ),
        ({"name": "pool", "size": 2.5}, InvalidRequestError, r"size must be a whole .* not 2\.5"),
        (
            {"name": "pool", "seed": -1},
            InvalidRequestError,
            "seed must be .* at least 0, not -1",
        ),
        ({"name": "pool", "requests": 5}, UnknownNameError, "sampler 'pool': 'requests'"),
        ({"name": "pool", "of": "curriculum"}, InvalidRequestError, "curriculum around the pool"),
        ({"name": "curriculum", "of": {"name": "fixed", "batch": 1}}, UnknownNameError, "'batch'"),
        ({"name": "curriculum", "requests": 0}, InvalidRequestError, "at least 1, not 0"),
        ({"name": "curriculum", "start_fraction": 1.0}, InvalidRequestError, r"0 and 1, not 1\.0"),
        ({"name": "curriculum", "of": {**LOW, "batch_size": 0}}, InvalidRequestError, "not 0"),
    ],
)
def test_mistakes_are_named_when_made(memory, spec, error, message):
    with pytest.raises(error, match=message):
        make_sampler(spec, memory)
