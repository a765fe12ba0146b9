"""A real workbench around a tiny random model: all that an environment needs, in milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rap_env.scoring.corpus import Corpus
from rap_env.workbench import Workbench
from tests.tiny import VOCAB_SIZE, tiny_llm

LAYERS = 3


def make_workbench(tokenizer: Any = None) -> Workbench:
    torch.set_num_threads(1)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    llm = tiny_llm(layers=LAYERS, tokenizer=tokenizer)
    return Workbench(llm, Corpus.of_tokens(tokens), importance="one_shot", progress=False)


@pytest.fixture(scope="session")
def workbench() -> Workbench:
    return make_workbench()
