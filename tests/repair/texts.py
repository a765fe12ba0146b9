"""Random tokens to fit on, and the errors of stubs on live models."""

import torch

from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.corpus import Corpus
from tests.tiny import VOCAB_SIZE


def random_text(seed: int = 0, windows: int = 40, length: int = 12) -> Corpus:
    """Windows of random tokens, which no two seeds share."""
    generator = torch.Generator().manual_seed(seed)
    return Corpus.of_tokens(torch.randint(3, VOCAB_SIZE, (windows, length), generator=generator))


def decoded(llm: ElasticLLM, text: Corpus, mask: Plan) -> torch.Tensor:
    """What the decoder gives for a text under a mask, (windows, T, H), in float32."""
    with torch.no_grad(), llm.masked(mask):
        return llm.hidden(text.tokens).float()


def state_error(llm: ElasticLLM, text: Corpus, mask: Plan) -> float:
    """Mean squared distance of the decoder's output to the dense model's."""
    apart = decoded(llm, text, mask) - decoded(llm, text, Plan())
    return float(apart.square().mean())


def divergence_of(llm: ElasticLLM, text: Corpus, mask: Plan) -> float:
    """Mean ``KL(dense || masked)`` of next-token predictions, nats per token."""
    with torch.no_grad():
        with llm.masked(Plan()):
            truth = llm.model(text.tokens, use_cache=False).logits.float().log_softmax(dim=-1)
        with llm.masked(mask):
            found = llm.model(text.tokens, use_cache=False).logits.float().log_softmax(dim=-1)
    return float((truth.exp() * (truth - found)).sum(dim=-1).mean())
