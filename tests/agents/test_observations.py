import numpy as np
import pytest

from agents.plan_observer import PlanObserver
from rap_env.errors import InvalidRequestError
from rap_env.ladder.ladder_bytes import mask_bytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.plan import Plan
from rap_env.request import Request
from tests.agents.synthetic import request_at


@pytest.mark.parametrize("which_context", ["context", "repaired_context"])
def test_batch_observations_equal_those_of_the_single_builder(request, which_context):
    context = request.getfixturevalue(which_context)
    builder = ObservationEncoder(mask_bytes(context.memory), context.features)
    requests = [request_at(context, *r) for r in [(1, 10, 0.9), (4, 50, 0.5), (8, 33, 0.4)]]
    count = context.memory.facts.num_blocks
    rng = np.random.default_rng(0)
    removed = (rng.random((40, count)) < 0.4).astype(int)
    removed[0], removed[1], removed[2, 1::2] = 0, 1, 1  # the last FFN block counts
    which = rng.integers(3, size=40)
    observer = PlanObserver(builder, requests)
    seen, over = observer.observe(which, removed), observer.over_bytes(which, removed)
    for row in range(40):
        asked = requests[which[row]]
        mask = Plan(frozenset(np.flatnonzero(removed[row]).tolist()))
        for key, expected in builder.build(asked, mask).items():
            assert np.array_equal(seen[key][row], expected), key
        peak = context.memory.peak_bytes(mask, asked)
        assert over[row] == max(0, peak - asked.budget_bytes)


def test_a_request_that_cannot_be_served_is_rejected(context):
    builder = ObservationEncoder(mask_bytes(context.memory), context.features)
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        PlanObserver(builder, [Request(1, 5000, 10**9)])
