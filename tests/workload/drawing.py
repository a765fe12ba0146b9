"""Helper that draws requests from a sampler."""

import numpy as np

from rap_env.memory import MemoryModel
from rap_env.request import Request

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def draws(sampler, count: int = 50, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def share(memory: MemoryModel, request: Request) -> float:
    dense = memory.dense_peak_bytes(request.batch_size, request.seq_len_tokens)
    return request.budget_bytes / dense
