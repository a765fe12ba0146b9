"""Streams beside a long prompt, on a tiny model."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from experiments.config.serving import SoakConfig
from experiments.errors import ExperimentError
from experiments.soak.newcomers import compare_streams, summary
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan
from rap_env.runtime.batch_shape import BatchShape
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from tests.serving.test_quality_floor import stack_of
from tests.serving.tokenizers import chat_tokenizer
from tests.tiny import tiny_llm

SOAK = SoakConfig(requests=3, prompt_tokens=6, answer_tokens=10, newcomer_tokens=40)


def test_the_limit_decides_what_a_long_prompt_does_to_the_streams_beside_it():
    tokenizer, records = chat_tokenizer(), {}
    memory = MemoryModel(tiny_llm(layers=3))
    budget = memory.peak_bytes(CompressionPlan(), BatchShape(3, 15).request(1)) + 5000
    for limit in (0.01, None):
        given = {
            "max_batch_size": 4,
            "max_delta_nll": None,
            "max_degradation_by_newcomer": limit,
        }
        records[limit] = compare_streams(stack_of(tokenizer, lambda: budget, **given), SOAK, 0)
    fair, unfair = records[0.01], records[None]
    assert (fair["streams"], fair["newcomers_served"]) == (3, 1)
    assert fair["above_limit"] == fair["other_plans"] == fair["other_tokens"] == 0
    assert unfair["other_plans"] > 0
    assert unfair["max_added_delta_nll"] > 0.01
    assert summary(fair).startswith("0 of 3 streams beside a long prompt had a plan whose")


def test_it_needs_predictions():
    stack = build_stack(
        ServerSettings(policy="dense", memory="8GiB"), llm=tiny_llm(tokenizer=chat_tokenizer())
    )
    with pytest.raises(ExperimentError, match="dense predicts no rise"):
        compare_streams(stack, SOAK, 0)
