import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from rap_env.errors import InfeasibleBudgetError, InvalidRequestError
from tests.envs.playing import LONG, make, make_vector, request_at


def test_the_workload_draws_and_options_override(context):
    env = make(context)
    drawn = {env.reset(seed=seed)[1]["request"]["budget_bytes"] for seed in range(8)}
    assert len(drawn) > 3
    request = request_at(context, 0.7)
    for given in (
        request,
        {**LONG, "budget_bytes": request.budget_bytes},
        {**LONG, "budget_fraction": 0.7},
    ):
        env.reset(seed=0, options={"request": given})
        assert env.request == request


def test_options_do_not_disturb_the_workload(context):
    plain, other = make(context), make(context)
    first = [plain.reset(seed=4)[1]["request"], plain.reset()[1]["request"]]
    other.reset(seed=4, options={"request": request_at(context)})
    assert [other.reset()[1]["request"]] == first[:1]


def test_requests_that_fit_the_dense_model_are_drawn_again(context):
    small, large = (context.memory.native_peak_bytes(1, n) for n in (8, 64))
    budget = (small + large) // 2
    grid = {"name": "grid", "batch_sizes": [1], "seq_lens_tokens": [8, 64]}
    env = make(context, workload={**grid, "budget_bytes": [budget]})
    lengths = {env.reset(seed=n)[1]["request"]["seq_len_tokens"] for n in range(12)}
    assert lengths == {64}


def test_a_workload_that_never_needs_pruning_is_rejected(context):
    env = make(context, workload={"name": "fixed", "budget_bytes": 2**60})
    with pytest.raises(InvalidRequestError, match=r"None of 100 requests .* smaller budget"):
        env.reset(seed=0)


def test_an_infeasible_budget_is_rejected_at_reset(context):
    env = make(context, infeasible="error", workload={"name": "fixed", **LONG})
    with pytest.raises(InfeasibleBudgetError, match=r"every block removed.*infeasible='clip'"):
        env.reset(options={"request": {**LONG, "budget_bytes": 10}})
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    mask_before = env.step(0)[-1]["removed"]
    with pytest.raises(InfeasibleBudgetError):
        env.reset(options={"request": {**LONG, "budget_bytes": 10}})
    assert list(env.plan.removed_names) == mask_before  # the running episode goes on


def half_infeasible(context) -> tuple[dict, int]:
    """A workload, half of whose budgets no mask can meet, and the budget that one can meet."""
    good = request_at(context, 0.9).budget_bytes
    grid = {"name": "grid", "batch_sizes": [8], "seq_lens_tokens": [64]}
    return {**grid, "budget_bytes": [10, good]}, good


def test_drawn_requests_that_no_mask_can_meet_are_drawn_again(context):
    workload, good = half_infeasible(context)
    env = make(context, infeasible="error", workload=workload)
    assert {env.reset(seed=seed)[1]["request"]["budget_bytes"] for seed in range(20)} == {good}
    vector = make_vector(context, infeasible="error", workload=workload)
    vector.reset(seed=0)
    for _ in range(30):
        *_, infos = vector.step(vector.action_masks().argmax(axis=1))
        assert set(infos["request"]["budget_bytes"].tolist()) == {good}
    clipping = make(context, infeasible="clip", workload=workload)
    assert any("infeasible" in clipping.reset(seed=seed)[1] for seed in range(20))


@pytest.mark.parametrize("workload", ["azure-conv", "grid", {"name": "tight"}], ids=str)
def test_generators_are_where_the_requests_so_far_left_them(task, workload):
    """Requests are drawn ahead, but nothing shows it."""
    env, envs = task.make(workload=workload), task.make_vector(workload=workload)
    expected = [np.random.default_rng(seed) for seed in (5, 6)]
    env.reset(seed=5)
    envs.reset(seed=5)
    for count in range(1, 20):
        for rng in expected:
            env._task._draw([rng])
        if count % 3 == 0:
            state = expected[0].bit_generator.state
            assert env.np_random.bit_generator.state == state == env.get_state()["generator"]
            assert [g.bit_generator.state for g in envs.np_random[:2]] == [
                rng.bit_generator.state for rng in expected
            ]
        env.reset()
        envs.reset()
        assert envs.requests[0] == env.request
