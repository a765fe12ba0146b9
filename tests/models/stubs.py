"""Random stubs for tiny models, one of each rank from none to several."""

import torch

from rap_env.models.families.placeholders import Stub
from rap_env.models.live.elastic import ElasticLLM

RANKS = (2, 0, 1, 3)


def random_stubs(llm: ElasticLLM, ranks=RANKS, seed: int = 0) -> dict[int, Stub]:
    """A stub for each block that `ranks` has an entry for, with no zero in it."""
    generator = torch.Generator().manual_seed(seed)
    wide = llm.adapter.hidden_size

    def drawn(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(llm.dtype)

    return {
        index: Stub(drawn(rank, wide), drawn(wide, rank), drawn(wide))
        for index, rank in enumerate(ranks)
    }


def repaired(llm: ElasticLLM, ranks=RANKS, seed: int = 0) -> ElasticLLM:
    """A view of the model with random stubs."""
    return llm.repaired(random_stubs(llm, ranks, seed), f"random-{seed}")
