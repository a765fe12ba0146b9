"""The score of a plan is that of decoding the text token by token with the real cache."""

import pytest
import torch

from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from rap_env.scoring.scorer import PlanScorer
from tests.scoring.test_scorer import tokens
from tests.tiny import (
    DISTINCT_FAMILIES,
    LAYERS,
    each_family,
    tiny_llm,
)

TOKENS = 44  # one finished group and a part of another, within the positions of the tiny models

# A state near the border between two steps of its quantisation may be rounded to either one. In
# bfloat16, passes of one and of many tokens differ by more than some steps.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}


def decoded_nll(llm, ids, plan):
    """NLL of each window, (windows,), from the logits of a batch that grows by a token a step."""
    with llm.applied(plan):
        batch = LiveBatch(llm)
        logits = [batch.prefill([row[:1] for row in ids.tolist()])]
        logits += [batch.extend(ids[:, place].tolist()) for place in range(1, ids.shape[1] - 1)]
    logs = torch.stack(logits, dim=1).log_softmax(dim=-1)
    return -logs.gather(-1, ids[:, 1:, None])[..., 0].double().mean(dim=1)


def check(llm, ids, plans, tolerance):
    """Compare scores with decoding; returns the rise of each plan's NLL over the native one."""
    scorer = PlanScorer(llm, ids)
    for plan in plans:
        expected = decoded_nll(llm, ids, plan).tolist()
        assert scorer.window_nll(plan) == pytest.approx(expected, abs=tolerance), plan
    native = scorer.window_nll(Plan())
    return [float(abs(scorer.window_nll(plan) - native).max()) for plan in plans]


@each_family(
    "family", DISTINCT_FAMILIES, level=["int8", "int4"], dtype=[torch.float32, torch.bfloat16]
)
def test_caches_at_a_level_and_at_the_lowest(family, level, dtype):
    llm, ids = tiny_llm(family, dtype=dtype), tokens(2, TOKENS)
    plans = [Plan.uniform(LAYERS, caches=name) for name in (level, "int2")]
    rises = check(llm, ids, plans, TOLERANCE[dtype])
    if dtype == torch.float32:
        assert rises[0] < rises[1]
        assert rises[1] > 5 * TOLERANCE[dtype]  # else an unquantised pass would do


@pytest.mark.parametrize(
    ("family", "level"),
    [
        ("llama", "window32"),
        ("llama", "int4-window32"),
        ("llama", "int2-window64"),
        ("gemma2", "int4-window32"),
        ("gpt2", "window32"),
        ("phi3_sliding", "window32"),
        ("phi3_sliding", "int2-window64"),
    ],
)
def test_windows(family, level):
    llm, ids = tiny_llm(family, positions=192), tokens(2, 150)
    (rise,) = check(llm, ids, [Plan.uniform(LAYERS, caches=level)], TOLERANCE[torch.float32])
    if family != "phi3_sliding" or not level.startswith("window"):  # its own window is 5 tokens
        assert rise > TOLERANCE[torch.float32]
